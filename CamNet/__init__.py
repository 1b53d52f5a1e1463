"""CAM-Net and cIMLE: a conditional generator that is trained by likelihood. Imports none of the top-level files."""

from CamNet.Generator import Generator

__all__ = ["Generator"]
