"""Output distributions, their Fisher matrices and their losses."""

from keras_natgrad.heads import links
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.bernoulli import Bernoulli
from keras_natgrad.heads.bounded import Beta, VonMises
from keras_natgrad.heads.categorical import Categorical, OneHotCategorical
from keras_natgrad.heads.counts import (
    Binomial,
    Geometric,
    NegativeBinomial,
    NegativeBinomialLogits,
    Poisson,
    ZeroInflatedPoisson,
)
from keras_natgrad.heads.directional import VonMisesFisher
from keras_natgrad.heads.dirichlet import Dirichlet, DirichletMultinomial
from keras_natgrad.heads.family import Family, Information, Parameter
from keras_natgrad.heads.generic import Distribution
from keras_natgrad.heads.joint import Joint
from keras_natgrad.heads.location_scale import (
    Cauchy,
    Gumbel,
    Laplace,
    Logistic,
    LogitNormal,
    LogNormal,
    StudentT,
)
from keras_natgrad.heads.loss_weight import LossWeight
from keras_natgrad.heads.losses import from_loss, register_loss
from keras_natgrad.heads.mixture import NormalMixture
from keras_natgrad.heads.multivariate import (
    Multinomial,
    MultivariateNormalTriL,
)
from keras_natgrad.heads.normal import MultivariateNormalDiag, Normal
from keras_natgrad.heads.ordinal import OrderedLogistic
from keras_natgrad.heads.positive import (
    Exponential,
    Gamma,
    InverseGamma,
    InverseGaussian,
    Weibull,
)
from keras_natgrad.heads.robust import Huber, HyperbolicSecant, Log1pNormal
from keras_natgrad.heads.serialization import get

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Cauchy",
    "Dirichlet",
    "DirichletMultinomial",
    "Distribution",
    "Exponential",
    "Family",
    "Gamma",
    "Geometric",
    "Gumbel",
    "Head",
    "Huber",
    "HyperbolicSecant",
    "Information",
    "InverseGamma",
    "InverseGaussian",
    "Joint",
    "Laplace",
    "Log1pNormal",
    "LogNormal",
    "Logistic",
    "LogitNormal",
    "LossWeight",
    "Multinomial",
    "MultivariateNormalDiag",
    "MultivariateNormalTriL",
    "NegativeBinomial",
    "NegativeBinomialLogits",
    "Normal",
    "NormalMixture",
    "OneHotCategorical",
    "OrderedLogistic",
    "Parameter",
    "Poisson",
    "StudentT",
    "VonMises",
    "VonMisesFisher",
    "Weibull",
    "ZeroInflatedPoisson",
    "from_loss",
    "get",
    "links",
    "register_loss",
]
