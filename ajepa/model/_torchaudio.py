"""The one place that imports torchaudio.

torchaudio 2.11 ships a CUDA-linked extension only; beside a CPU build of torch its import fails for want of
libc10_cuda.so. Its Python parts (fbank, MelSpectrogram, resample) need no extension, so a stub stands in for it.
"""

import sys
import types


def import_torchaudio():
    try:
        import torchaudio
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
        stub.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
        sys.modules["torchaudio._extension"] = stub
        import torchaudio
    import torchaudio.compliance.kaldi
    import torchaudio.functional
    import torchaudio.transforms

    return torchaudio
