"""Photos, with captions and masks, and lists of subjects. Imports no other folder of the package."""
