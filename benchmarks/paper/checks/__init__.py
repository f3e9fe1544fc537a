"""Small scripts that look at what contradicts the papers for a mistake of ours: plain torch and numpy, nothing of our package."""
