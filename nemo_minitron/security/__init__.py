"""Text, files and credentials of strangers and users: nothing read is run, shown as markup or told on."""
