"""Profiles: how images are prepared, methods chosen and maps scored. The default is corrected; others are published ones."""

from featcache.attribution.profiles.how_to_probe import HowToProbe
from featcache.attribution.profiles.profile import Profile
from featcache.errors import BadInput, nearest

PROFILES: dict[str, Profile] = {"how-to-probe": HowToProbe()}


def profile_named(name: str | None) -> Profile:
    """Return the profile of a name, the corrected one for None. Raises BadInput for an unknown name."""
    if name is None:
        return Profile()
    if name not in PROFILES:
        raise BadInput(f"--parity: unknown profile {name!r}{nearest(name, PROFILES)} (known: {', '.join(PROFILES)})")
    return PROFILES[name]
