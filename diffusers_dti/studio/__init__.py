"""The studio: a page in the browser to learn concepts and to try them out (`dti studio`). Needs Gradio."""

import os

# Before Gradio is imported, which would otherwise report each start to its makers and ask for its newest release.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
