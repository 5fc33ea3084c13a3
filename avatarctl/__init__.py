"""avatarctl: train, run, convert and size up audio-driven avatar video models of the Wan family.

The package is imported lazily: `import avatarctl` loads neither torch nor numpy. The public
library surface is described in docs/python.md.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
