"""CAM-Net, a conditional generator, with cIMLE and the energy score, which train it. Imports no top-level file."""
