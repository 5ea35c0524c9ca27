"""ModelOpt-quantised Megatron-Core models as checkpoints that serving engines load.

Importing this package needs neither torch nor modelopt.
"""

__version__ = "0.1.0"
