"""How near generated images come to real ones: distances of features, counts of classes, nearest neighbours."""

from spectralnorm.metrics.bootstrap import Bootstrap, frechet_bootstrap, kernel_bootstrap
from spectralnorm.metrics.classes import ClassStatistics, class_statistics
from spectralnorm.metrics.confidence import MEAN_BOUNDS, betting_bound, empirical_bernstein_bound
from spectralnorm.metrics.copying import Copying, copying
from spectralnorm.metrics.critic import CriticOptions, StrictCritic, train_critic
from spectralnorm.metrics.distances import frechet_distance, kernel_distance
from spectralnorm.metrics.diversity import Diversity, diversity
from spectralnorm.metrics.evaluation import DEFAULT_METRICS, Progress, evaluate
from spectralnorm.metrics.extractor_files import EXTRACTORS_FROM_FILE, FileExtractor
from spectralnorm.metrics.extractors import EXTRACTORS, load_extractor
from spectralnorm.metrics.inception_score import inception_score
from spectralnorm.metrics.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    neighbour_radii,
    precision_recall,
)
from spectralnorm.metrics.measures import MEASURES, Measure, Seen
from spectralnorm.metrics.modes import ClassModes, Modes, class_modes, count_modes
from spectralnorm.metrics.neighbours import nearest_neighbours
from spectralnorm.metrics.network_extractor import FeatureExtractor, Features, NetworkExtractor
from spectralnorm.metrics.path_length import PathLength, path_length
from spectralnorm.metrics.wasserstein import (
    WassersteinBound,
    clipping_interval,
    critic_lower_bound,
    wasserstein_lower_bound,
)

__all__ = [
    "DEFAULT_METRICS",
    "EXTRACTORS",
    "EXTRACTORS_FROM_FILE",
    "MEAN_BOUNDS",
    "MEASURES",
    "Bootstrap",
    "ClassModes",
    "ClassStatistics",
    "Copying",
    "CriticOptions",
    "DensityCoverage",
    "Diversity",
    "FeatureExtractor",
    "Features",
    "FileExtractor",
    "Measure",
    "Modes",
    "NetworkExtractor",
    "PathLength",
    "PrecisionRecall",
    "Progress",
    "Seen",
    "StrictCritic",
    "WassersteinBound",
    "betting_bound",
    "class_modes",
    "class_statistics",
    "clipping_interval",
    "copying",
    "count_modes",
    "critic_lower_bound",
    "density_coverage",
    "diversity",
    "empirical_bernstein_bound",
    "evaluate",
    "frechet_bootstrap",
    "frechet_distance",
    "inception_score",
    "kernel_bootstrap",
    "kernel_distance",
    "load_extractor",
    "nearest_neighbours",
    "neighbour_radii",
    "path_length",
    "precision_recall",
    "train_critic",
    "wasserstein_lower_bound",
]
