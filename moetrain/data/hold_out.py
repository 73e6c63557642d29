"""Which documents are held out for validation. The rule is the same for sources in memory and prepared ones, so that a
document that is held out of one source is not trained on in another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.data.config import DataConfig
from moetrain.data.sources import Choice, key_hash
from moetrain.data.store.index import Part, prepared_folders, read_index
from moetrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Documents whose hash is below `fraction` are held out.

    lone: hashes of documents that prepared sources hold out although they are not below `fraction`, because no other
    document of theirs is. They are not trained on.
    """

    fraction: float
    lone: frozenset[float] = frozenset()

    def parts(self, keys: Sequence[str]) -> list[Part]:
        """Return the part of each document of a source in memory, by its key.

        The document with the smallest hash is always held out, so that a small source has validation rows too. A single
        document is used for training.
        """
        hashes = [key_hash(key, choice=Choice.hold_out) for key in keys]
        smallest = min(hashes) if len(hashes) > 1 else None
        return [self._part(value, is_smallest=value == smallest, is_alone=smallest is None) for value in hashes]

    def _part(self, value: float, *, is_smallest: bool, is_alone: bool) -> Part:
        if is_smallest or (value < self.fraction and not is_alone):
            return Part.held_out
        return Part.left_out if value in self.lone else Part.training


def hold_out_of(config: DataConfig) -> HoldOut:
    """Return the rule of a stage: that of its prepared sources, else `data.validation_fraction`.

    Raises ConfigError where sources were prepared with different shares, or with another one than the config's.
    """
    rules = {name: read_index(folder).split_rule for name, folder in prepared_folders(config).items()}
    shares = {name: rule["fraction"] for name, rule in rules.items() if rule.get("fraction") is not None}
    wanted = config.validation_fraction
    for name, share in shares.items():
        if wanted not in (share, DataConfig().validation_fraction):
            raise ConfigError(
                f"data.validation_fraction is {wanted}, and data.sources.{name} was prepared with {share}: leave it "
                "out, or prepare the source again"
            )
    if len(set(shares.values())) > 1:
        raise ConfigError(
            f"data.sources.{' and data.sources.'.join(shares)} were prepared with data.validation_fraction "
            f"{' and '.join(map(str, shares.values()))}: a document held out of one could be trained on in another; "
            "prepare them with the same"
        )
    return HoldOut(
        fraction=next(iter(shares.values()), wanted),
        lone=frozenset(rule["lone"] for rule in rules.values() if rule.get("lone") is not None),
    )
