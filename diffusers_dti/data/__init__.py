"""Photos and subjects.

`images.py` reads photos, captions and masks, `subjects.py` the JSON files that list subjects, and `dreambooth.py` downloads
the data set of the paper. No other folder is imported.
"""
