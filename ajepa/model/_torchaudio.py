"""The one place that imports torchaudio, which is optional: `FrontEnd` has a plain definition to use in its place.

torchaudio's wheels hold a CUDA-linked extension; beside a CPU build of torch the import of that extension fails for
want of libc10_cuda.so. The Python parts (fbank, MelSpectrogram, resample) need no extension, so a stub replaces it.
"""

import functools
import sys
import types
import warnings


def import_torchaudio():
    """The module torchaudio with its transforms. Raises ModuleNotFoundError where torchaudio is not installed, and
    whatever the import raises where the installed torchaudio does not match the installed torch."""
    try:
        return _import()
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            raise
    except Exception:
        pass  # the second attempt, without the extension, tells whether the Python parts work
    _forget()
    stub = types.ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
    stub.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
    sys.modules["torchaudio._extension"] = stub
    try:
        return _import()
    except Exception:
        _forget()  # a half-imported package would hide the error from the next import
        raise


@functools.cache
def has_torchaudio() -> bool:
    """True where torchaudio can be imported. Warns once about an installed torchaudio that cannot."""
    try:
        import_torchaudio()
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            return False
        reason: Exception = error
    except Exception as error:
        reason = error
    else:
        return True
    warnings.warn(
        "the installed torchaudio does not match the installed torch, so the plain engine's front end is the plain "
        f"definition of log_mel instead ({type(reason).__name__}: {reason})",
        stacklevel=2,
    )
    return False


def _import():
    import torchaudio
    import torchaudio.compliance.kaldi
    import torchaudio.functional
    import torchaudio.transforms

    return torchaudio


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
