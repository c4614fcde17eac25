"""Tensors and files on disk: atomic writes, and safetensors as a whole or tensor by tensor.

Every file carries the SHA-256 of what it holds; an altered byte is found when it is read.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.storage.digests import tensor_digest as tensor_digest
    from fedcompo.storage.files import write_atomically as write_atomically
    from fedcompo.storage.tensorstream import StreamedTensors as StreamedTensors
    from fedcompo.storage.tensorstream import TensorWriter as TensorWriter
    from fedcompo.storage.tensorstream import file_sha256 as file_sha256
    from fedcompo.storage.tensorstream import save_streamed as save_streamed

__all__, __getattr__, __dir__ = face(__name__)
