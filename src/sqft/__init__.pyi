# What type checkers see of the lazy names in __init__.py.
from sqft.adapters.config import SqftConfig as SqftConfig
from sqft.adapters.peft_bridge import attach as attach
from sqft.comparison import compare as compare
from sqft.compressing.stage import compress as compress
from sqft.compressing.stage import quantize as quantize
from sqft.compressing.stage import sparsify as sparsify
from sqft.config import EvaluateConfig as EvaluateConfig
from sqft.config import ExtractConfig as ExtractConfig
from sqft.config import MergeConfig as MergeConfig
from sqft.config import QuantizeConfig as QuantizeConfig
from sqft.config import SearchConfig as SearchConfig
from sqft.config import SparsifyConfig as SparsifyConfig
from sqft.config import TrainConfig as TrainConfig
from sqft.deployment import ExportConfig as ExportConfig
from sqft.deployment import GenerateConfig as GenerateConfig
from sqft.deployment import MeasureConfig as MeasureConfig
from sqft.deployment import PackConfig as PackConfig
from sqft.deployment import UnpackConfig as UnpackConfig
from sqft.elastic.handle import Elastic as Elastic
from sqft.elastic.handle import get_ranks as get_ranks
from sqft.elastic.handle import set_ranks as set_ranks
from sqft.elastic.scheduler import RankScheduler as RankScheduler
from sqft.errors import SqftError as SqftError
from sqft.errors import UsageError as UsageError
from sqft.errors import VerificationError as VerificationError
from sqft.evaluation.stage import evaluate as evaluate
from sqft.exporters.compacting import pack as pack
from sqft.exporters.compacting import unpack as unpack
from sqft.exporters.stage import export as export
from sqft.folders import load as load
from sqft.folders import save as save
from sqft.measuring.stage import measure as measure
from sqft.merging.stage import merge as merge
from sqft.recipe import run as run
from sqft.reporting.page import report as report
from sqft.searching.choose import extract as extract
from sqft.searching.stage import search as search
from sqft.serving.generate import generate as generate
from sqft.serving.prepare import prepare as prepare
from sqft.tasks.base import Example as Example
from sqft.training.distill import Distill as Distill
from sqft.training.loop import train as train

__version__: str
__all__: list[str]
from sqft.deployment import ServeConfig as ServeConfig
from sqft.serving.serve import serve as serve
