"""CAM-Net, a conditional generator, and cIMLE, which trains it. Imports none of the top-level files."""
