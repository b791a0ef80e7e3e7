"""Splits in which no group of related subjects is on two sides, and the subjects that two domains share."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rows import DataError, draw

from examples.science.settings import SplitSettings
from examples.science.subject import Subject

SPLITS = ("test", "valid", "train")  # in the order they are filled
Splits = dict[str, list[Subject]]


def split_subjects(subjects: Sequence[Subject], settings: SplitSettings, seed: int, apart: Iterable[str]) -> Splits:
    """Distribute subjects over test, valid and train, whole groups at a time in a random order.

    Of a group that is held out at most `settings.per_group` subjects are asked about, the others are left out. Groups
    of more than `settings.largest` all go to train: one family must not be half a test set. Subjects that data/ holds
    out, and those in `apart` (keys), are in no split.

    Raises DataError if too few are left for test or valid.
    """
    unused = set(apart)
    groups: defaultdict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        if not subject.reserved and subject.key not in unused:
            groups[subject.group].append(subject)
    sizes = {"test": settings.test, "valid": settings.valid}
    splits: Splits = {name: [] for name in SPLITS}
    for group in sorted(groups, key=lambda name: draw(seed, name)):
        members = sorted(groups[group], key=lambda subject: draw(seed, subject.key))
        open_splits = [name for name in sizes if len(splits[name]) < sizes[name]]
        if open_splits and len(members) <= settings.largest:
            name = open_splits[0]
            splits[name] += members[: min(settings.per_group, sizes[name] - len(splits[name]))]
        else:
            splits["train"] += members
    short = {name: len(splits[name]) for name, size in sizes.items() if len(splits[name]) < size}
    if short or not splits["train"]:
        raise DataError(f"{len(subjects)} subjects don't fill the splits: {short} of {sizes}. Ask for smaller ones.")
    return {name: sorted(part, key=lambda subject: draw(seed, "order", subject.key)) for name, part in splits.items()}


def shared_keys(one: Sequence[Subject], other: Sequence[Subject], count: int, seed: int) -> list[str]:
    """At most `count` keys that two domains have in common, in a random order: for questions that need both.

    Subjects that data/ holds out count too: they are in no training set, so both domains' answers to them are unseen.
    """
    known = {subject.key for subject in one}
    both = {subject.key for subject in other if subject.key in known}
    return sorted(both, key=lambda key: draw(seed, "shared", key))[:count]


def check(splits: Mapping[str, Sequence[Subject]]) -> None:
    """Raise DataError if a subject is there twice or a group in two splits."""
    homes: defaultdict[str, set[str]] = defaultdict(set)
    keys: set[str] = set()
    for name, part in splits.items():
        for subject in part:
            if subject.key in keys:
                raise DataError(f"{subject.key!r} is there twice. Remove duplicates first.")
            keys.add(subject.key)
            homes[subject.group].add(name)
    torn = [group for group, names in homes.items() if len(names) > 1]
    if torn:
        raise DataError(f"{len(torn)} groups are in two splits, e.g. {torn[0]!r}. Give their subjects one group.")
