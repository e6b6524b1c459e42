"""What is learned, and how it travels.

`concept.py` has the concept itself, `inversion.py` the one that goes to and from files and the Hub. `formats.py` and
`third_party.py` read and write files, `source.py` and `hub.py` find and download them, `publish.py` and `model_card.py` push
them, and `convert.py` rewrites them for other programs. `registry.py` and `methods.py` list the known text encoders, model
families and training methods. Nothing here knows pipelines, and no other folder is imported.
"""
