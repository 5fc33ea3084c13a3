"""One stateless object per model family: everything that differs between them."""

from avatarctl.errors import NotYetSupported
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.families.stableavatar import StableAvatar
from avatarctl.family import Family

__all__ = ["FAMILIES", "OmniAvatar", "StableAvatar", "family_named"]

FAMILIES: dict[str, Family] = {family.name: family for family in (OmniAvatar(), StableAvatar())}
"""By the name that registry rows give; another family adds itself."""


def family_named(name: str) -> Family:
    """The family object of a registry row. Raises NotYetSupported for one without code."""
    if name not in FAMILIES:
        raise NotYetSupported(f"the model family {name} is not yet supported", where="model.name")
    return FAMILIES[name]
