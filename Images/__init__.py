"""The chain under Data.py: image files are listed, decoded, cached or streamed; the embedded data set is drawn."""
