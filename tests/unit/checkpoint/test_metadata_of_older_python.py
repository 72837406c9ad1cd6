"""Python 3.11.0 to 3.11.3 (Debian 12) pickle an enum member as ``getattr(kind, name)``."""

from __future__ import annotations

import io
import pickle

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_medgpt.checkpoint.metadata import _MetadataUnpickler
from megatron_medgpt.config.errors import UsageError


class ByGetattr:
    """Pickles as ``getattr(target, name)``, whatever the Python."""

    def __init__(self, target: object, name: str):
        self.target, self.name = target, name

    def __reduce__(self):
        return getattr, (self.target, self.name)


def unpickle(value: object) -> object:
    return _MetadataUnpickler(io.BytesIO(pickle.dumps(value, protocol=2))).load()


def test_an_enum_member_by_name_is_read():
    assert (
        unpickle(ByGetattr(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")) is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    )


@pytest.mark.parametrize("name", ["__class__", "mro", "__subclasses__"])
def test_getattr_reaches_nothing_but_members_of_allowed_enums(name):
    with pytest.raises(UsageError, match="do not trust this checkpoint"):
        unpickle(ByGetattr(_MEM_FORMAT_ENCODING, name))


def test_getattr_of_something_that_is_no_enum_is_refused():
    from torch.distributed.checkpoint.metadata import Metadata

    with pytest.raises(UsageError, match="do not trust this checkpoint"):
        unpickle(ByGetattr(Metadata, "__init__"))
