"""AIMET's names over bitwright: a script of AIMET runs once its imports say `bitwright_aimet.torch` for `aimet_torch`.

`aimet_common`, `aimet_torch`, `aimet_onnx` and `aimet_tensorflow` (with `aimet_tensorflow.keras`) become
`bitwright_aimet.common`, `.torch`, `.onnx` and `.tensorflow`. What the names mean here, and where that differs, is in
`docs/coming-from-aimet.md`; what can't be meant is refused with the call to make instead. No framework is imported
before a model of it is given.
"""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_modules

tell_modules()
