"""Text, files and credentials: nothing read is run or shown as markup, and no credential leaves."""
