"""Class-incremental learning on frozen pre-trained vision transformers.

The public names are in ``__init__.pyi``, for type checkers and for this file alike. Each is imported when it is first
used, because timm, peft and avalanche take seconds to import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
