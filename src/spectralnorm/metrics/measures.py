"""From features to metrics: what each is called, what it needs, its value, its floor and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from spectralnorm.errors import UserError
from spectralnorm.metrics.bootstrap import FEWEST_PAIRED, frechet_bootstrap, kernel_bootstrap
from spectralnorm.metrics.cache import hash_of, remember
from spectralnorm.metrics.classes import COVERED_SHARE, class_statistics
from spectralnorm.metrics.copying import copying
from spectralnorm.metrics.distances import default_subset_size, frechet_distance, kernel_distance
from spectralnorm.metrics.diversity import diversity
from spectralnorm.metrics.inception_score import inception_score
from spectralnorm.metrics.manifold import density_coverage, precision_recall
from spectralnorm.metrics.modes import class_modes
from spectralnorm.metrics.network_extractor import FeatureExtractor, Features
from spectralnorm.metrics.pairwise import smallest_distances
from spectralnorm.metrics.wasserstein import WassersteinBound, wasserstein_lower_bound
from spectralnorm.records import Metric, Provenance

__all__ = ["MEASURES", "NEEDS", "Measure", "Seen"]

_MANIFOLD_NEIGHBOURS = 3
_COVERAGE_NEIGHBOURS = 5
_MOST_NEIGHBOURS = max(_MANIFOLD_NEIGHBOURS, _COVERAGE_NEIGHBOURS)
_NEARER_THAN = 0.05
# More than so many cannot all have the share that counts as covered.
_MOST_CLASSES = round(1 / COVERED_SHARE)

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "logits": "an extractor that classifies",
        "classes": f"an extractor that classifies, with at most {_MOST_CLASSES} classes",
        "training": "the images that were trained on",
        "differences": "real images that differ",
    }
)
"""What a metric may need beside features, in words."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything that a metric may be made of, as one extractor sees it."""

    extractor: FeatureExtractor
    provenance: Provenance
    fake: Features
    reference: Features
    """Real images to compare with."""
    stand_ins: Features | None
    """Real images in the place of generated ones; None if there are too few to be parted."""
    training: Features | None
    """Of the images that were trained on, if they are known."""
    key: str
    """Names the real images, the extractor and how they are parted."""
    training_key: str
    seed: int
    class_names: Sequence[str] = ()
    with_intervals: bool = False

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return torch.device(getattr(self.extractor, "device", "cpu"))

    def name(self, kind: str) -> str:
        """``FD-SqueezeNet``; ``FID``, ``KID`` and ``IS`` are kept for the published Inception."""
        if getattr(self.extractor, "is_published_inception", False) and kind in ("FD", "KID", "IS"):
            return {"FD": "FID"}.get(kind, kind)
        return f"{kind}-{self.extractor.name}"

    def floors(self, name: str, compute: Callable[[Features], Sequence[float]]) -> Sequence[float | None]:
        """What the stand-ins score, kept from one evaluation to the next; nothing where there are none."""
        stand_ins = self.stand_ins
        if stand_ins is None:
            return [None] * 8
        key = hash_of(self.key, name, self.seed)
        found = remember(key, lambda: {"floors": torch.tensor(compute(stand_ins), dtype=torch.float64)})
        return found["floors"].tolist()

    def reference_radii(self, k: int) -> Tensor:
        """Distance of each reference image to its k-th neighbour among them, kept from one evaluation to the next."""
        features, most = self.reference.features, _MOST_NEIGHBOURS

        def compute() -> dict[str, Tensor]:
            return {"distances": smallest_distances(features, features, k=most + 1, device=self.device)}

        # The first is the image itself.
        return remember(hash_of(self.key, "neighbours", most), compute)["distances"][:, k]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One or more metrics that are computed together."""

    compute: Callable[[Seen], list[Metric]]
    needs: str = ""
    """One of `NEEDS`; empty: nothing but features."""
    fewest: tuple[int, int] = (2, 2)
    """Generated images, or stand-ins for them, and reference images that it needs."""

    def lacks(self, seen: Seen) -> str | None:
        """What it needs and is not there, in words; None if it is possible."""
        logits = seen.fake.logits
        is_there = {
            "": True,
            "logits": logits is not None,
            "classes": logits is not None and logits.shape[1] <= _MOST_CLASSES,
            "training": seen.training is not None,
            "differences": bool((seen.reference.features != seen.reference.features[:1]).any()),
        }
        if not is_there[self.needs]:
            return NEEDS[self.needs]
        compared = [seen.fake] if seen.stand_ins is None else [seen.fake, seen.stand_ins]
        generated, reference = min(len(part.features) for part in compared), len(seen.reference.features)
        if generated >= self.fewest[0] and reference >= self.fewest[1]:
            return None
        return (
            f"at least {self.fewest[0]} generated and {self.fewest[1]} real images beside those set aside for the "
            f"floor, here {generated} and {reference}"
        )


def _frechet(seen: Seen) -> list[Metric]:
    reference, fake = seen.reference.features, seen.fake.features
    value = frechet_distance(reference, fake)
    (floor, *_) = seen.floors("frechet", lambda part: [frechet_distance(reference, part.features)])
    interval, details = None, {}
    if seen.with_intervals:
        drawn = frechet_bootstrap(reference, fake, seed=seen.seed, device=seen.device)
        low, high = drawn.interval(value)
        interval = (max(0.0, low), high)
        details = {"standard error": drawn.standard_error, "bias at this number of images": drawn.bias}
    return [
        Metric(
            name=seen.name("FD"),
            value=value,
            floor=floor,
            interval=interval,
            details=details,
            provenance=seen.provenance,
        )
    ]


def _kernel(seen: Seen) -> list[Metric]:
    reference, fake = seen.reference.features, seen.fake.features
    # One size for value and floor: their subsets differ by chance alone.
    num_compared = len(fake) if seen.stand_ins is None else len(seen.stand_ins.features)
    size = default_subset_size(len(reference), min(len(fake), num_compared))
    value, spread = kernel_distance(reference, fake, subset_size=size, seed=seen.seed)
    (floor, *_) = seen.floors(
        f"kernel {size}",
        lambda part: [kernel_distance(reference, part.features, subset_size=size, seed=seen.seed)[0]],
    )
    interval, details = None, {"subset size": size}
    if seen.with_intervals and min(len(reference), len(fake)) >= FEWEST_PAIRED:
        drawn = kernel_bootstrap(reference, fake, seed=seen.seed, device=seen.device)
        # The value is a mean over 100 random subsets of what the draws see whole: two sources of chance.
        error = math.hypot(drawn.standard_error, spread / 100**0.5)
        half = drawn.interval(0.0)[1] * error / drawn.standard_error if drawn.standard_error else 0.0
        interval = (value - half, value + half)
        details |= {"standard error": error}
    return [
        Metric(
            name=seen.name("KID"),
            value=value,
            spread=spread,
            floor=floor,
            interval=interval,
            details=details,
            provenance=seen.provenance,
        )
    ]


def _classes(seen: Seen) -> list[Metric]:
    logits = _logits(seen.fake)
    found = class_statistics(logits)
    names = tuple(seen.class_names) or tuple(map(str, range(len(found.shares))))
    if len(names) != len(found.shares):
        raise UserError(
            f"{seen.provenance.extractor} knows {len(found.shares)} classes, but {len(names)} names were given."
        )
    floor = None
    if seen.stand_ins is not None and seen.stand_ins.logits is not None:
        floor = class_statistics(seen.stand_ins.logits)
    return [
        Metric(
            name="Class coverage",
            value=found.coverage,
            floor=None if floor is None else floor.coverage,
            better="higher",
            details=dict(zip(names, found.shares, strict=True)),
            provenance=seen.provenance,
        ),
        Metric(
            name="Class entropy",
            value=found.entropy,
            floor=None if floor is None else floor.entropy,
            better="higher",
            details={
                "if all were equally frequent": math.log(len(names)),
                "divergence from that": class_modes(logits).divergence,
            },
            provenance=seen.provenance,
        ),
        Metric(
            name="Confident share",
            value=found.confident_share,
            floor=None if floor is None else floor.confident_share,
            better="higher",
            provenance=seen.provenance,
        ),
    ]


def _score(seen: Seen) -> list[Metric]:
    logits = _logits(seen.fake)
    splits = 10 if len(logits) >= 100 else 1
    value, spread = inception_score(logits, splits=splits, seed=seen.seed)
    (floor, *_) = seen.floors(
        f"score {splits}", lambda part: [inception_score(_logits(part), splits=min(splits, len(part.features)))[0]]
    )
    return [
        Metric(
            name=seen.name("IS"),
            value=value,
            spread=spread,
            floor=floor,
            better="higher",
            details={"splits": splits},
            provenance=seen.provenance,
        )
    ]


def _precision(seen: Seen) -> list[Metric]:
    k = _MANIFOLD_NEIGHBOURS
    radii = seen.reference_radii(k)

    def compute(part: Features) -> Sequence[float]:
        return precision_recall(seen.reference.features, part.features, k=k, real_radii=radii, device=seen.device)

    return _shares(seen, ("Precision", "Recall"), compute, k=k)


def _density(seen: Seen) -> list[Metric]:
    k = _COVERAGE_NEIGHBOURS
    radii = seen.reference_radii(k)

    def compute(part: Features) -> Sequence[float]:
        return density_coverage(seen.reference.features, part.features, k=k, real_radii=radii, device=seen.device)

    return _shares(seen, ("Density", "Coverage"), compute, k=k)


def _shares(
    seen: Seen, kinds: Sequence[str], compute: Callable[[Features], Sequence[float]], *, k: int
) -> list[Metric]:
    floors = seen.floors(f"{kinds} {k}", compute)
    return [
        Metric(
            name=seen.name(kind),
            value=value,
            floor=floor,
            better="higher",
            details={"k": k},
            provenance=seen.provenance,
        )
        for kind, value, floor in zip(kinds, compute(seen.fake), floors, strict=False)
    ]


def _diversity(seen: Seen) -> list[Metric]:
    reference = seen.reference

    def compute(part: Features) -> Sequence[float]:
        classes = [None if of.logits is None else of.logits.argmax(1) for of in (reference, part)]
        found = diversity(
            reference.features,
            part.features,
            real_classes=classes[0],
            fake_classes=classes[1],
            device=seen.device,
        )
        return [found.overall] if found.within_class is None else [found.overall, found.within_class]

    values = compute(seen.fake)
    floors = [*seen.floors("diversity", compute), None]
    names = (seen.name("Diversity"), seen.name("Diversity within classes"))
    return [
        Metric(name=name, value=value, floor=floor, better="near 1", provenance=seen.provenance)
        for name, value, floor in zip(names, values, floors, strict=False)
    ]


def _copying(seen: Seen) -> list[Metric]:
    assert seen.training is not None
    training = seen.training.features

    def nearest(part: Features) -> Tensor:
        return smallest_distances(part.features, training, k=1, device=seen.device)[:, 0]

    key = hash_of(seen.key, seen.training_key, "nearest training image")
    usual = remember(key, lambda: {"distances": nearest(seen.reference)})["distances"]
    found = copying(nearest(seen.fake), usual, quantile=_NEARER_THAN)
    (floor, *_) = seen.floors(
        f"copying {seen.training_key}", lambda part: [copying(nearest(part), usual, quantile=_NEARER_THAN).share]
    )
    return [
        Metric(
            name=seen.name("Copied share"),
            value=found.share,
            floor=floor,
            details={
                "nearer than this share of held-out images": _NEARER_THAN,
                "probability of being nearer than a held-out one": found.probability,
                "median distance over that of held-out ones": found.median_ratio,
                "training images": len(training),
            },
            provenance=seen.provenance,
        )
    ]


def _wasserstein(seen: Seen) -> list[Metric]:
    reference = seen.reference.features
    found = wasserstein_lower_bound(reference, seen.fake.features, seed=seen.seed)
    (floor, *_) = seen.floors(
        "wasserstein",
        lambda part: [wasserstein_lower_bound(reference, part.features, seed=seen.seed).lower_confidence_bound],
    )
    return [
        Metric(
            name=seen.name("W1 lower bound"),
            value=found.lower_confidence_bound,
            floor=floor,
            details=_wasserstein_details(found),
            provenance=seen.provenance,
        )
    ]


def _wasserstein_details(found: WassersteinBound) -> dict[str, float]:
    return {
        "estimate": found.estimate,
        "confidence": found.confidence,
        "critic's constant": found.lipschitz,
        "real images for the bound": found.num_samples[0],
        "generated images for the bound": found.num_samples[1],
    }


def _logits(features: Features) -> Tensor:
    assert features.logits is not None
    return features.logits


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "fd": Measure(compute=_frechet),
        "kid": Measure(compute=_kernel),
        "wasserstein": Measure(compute=_wasserstein, fewest=(20, 20)),
        "classes": Measure(compute=_classes, needs="classes"),
        "is": Measure(compute=_score, needs="logits"),
        "pr": Measure(compute=_precision, fewest=(_MANIFOLD_NEIGHBOURS + 1, _MOST_NEIGHBOURS + 1)),
        "dc": Measure(compute=_density, fewest=(2, _MOST_NEIGHBOURS + 1)),
        "diversity": Measure(compute=_diversity, needs="differences"),
        "copying": Measure(compute=_copying, needs="training"),
    }
)
"""By the name that asks for them, in the order in which they are reported."""
