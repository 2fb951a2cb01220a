"""K-FAC and a whole step of it, from per-example Jacobians."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.reference import fisher, heads
from tests.reference.heads import Term
from tests.reference.network import Array, Network, Trace


def cotangents(
    trace: Trace,
    terms: Sequence[Term],
    parameter: int,
    values: Sequence[Array],
) -> Array:
    """`Σ √c Jᵀ L e` per example, `[N, S, m]`, for `e` of `[N, P, K]` each."""
    total = 0.0
    for output, (term, e) in enumerate(zip(terms, values, strict=True)):
        sent = np.einsum(
            "np,npkr,npr->npk",
            np.sqrt(term.coefficients),
            heads.factor(term, trace.outputs[output]),
            e,
        )
        total += np.einsum(
            "npk,npksm->nsm", sent, trace.jacobians[parameter][output]
        )
    return total


def score_cotangents(
    trace: Trace, terms: Sequence[Term], parameter: int, signs: Sequence[Array]
) -> Array:
    """`Σ ± √c Jᵀ s` per example, with `[N, P]` signs per term."""
    total = 0.0
    for output, (term, sign) in enumerate(zip(terms, signs, strict=True)):
        sent = (sign * np.sqrt(term.coefficients))[..., np.newaxis]
        sent = sent * heads.score(term, trace.outputs[output], term.targets)
        total += np.einsum(
            "npk,npksm->nsm", sent, trace.jacobians[parameter][output]
        )
    return total


def unit_columns(trace: Trace) -> Iterator[list[Array]]:
    """All columns of the loss factor, as values for `cotangents`."""
    zeros = [np.zeros_like(eta) for eta in trace.outputs]
    for output, eta in enumerate(trace.outputs):
        for position in range(eta.shape[1]):
            for unit in range(eta.shape[2]):
                values = [z.copy() for z in zeros]
                values[output][:, position, unit] = 1.0
                yield values


def example_weights(terms: Sequence[Term]) -> Array:
    """Relative weight per example, summing to one."""
    weights = sum(term.coefficients.sum(axis=1) for term in terms)
    return weights / weights.sum()


def input_factor(
    inputs: Array, weights: Array, weight_sharing: str = "expand"
) -> Array:
    """`A`, `[rows, rows]`."""
    if weight_sharing == "reduce":
        inputs = inputs.mean(axis=1, keepdims=True)
    moments = np.einsum("nsa,nsb->nab", inputs, inputs) / inputs.shape[1]
    return np.einsum("n,nab->ab", weights, moments)


def input_magnitude(
    inputs: Array, weights: Array, weight_sharing: str = "expand"
) -> Array:
    """`E|x|` of the inputs, `[rows]`."""
    if weight_sharing == "reduce":
        inputs = inputs.mean(axis=1, keepdims=True)
    return weights @ np.abs(inputs).mean(axis=1)


def output_factor(
    columns: Sequence[Array], weight_sharing: str = "expand"
) -> Array:
    """`G`, `[m, m]`, the sum over columns of `[N, S, m]` cotangents."""
    total = 0.0
    for g in columns:
        if weight_sharing == "reduce":
            g = g.sum(axis=1, keepdims=True)
        total += np.einsum("nsa,nsb->ab", g, g)
    return total


def exact_factors(
    trace: Trace,
    terms: Sequence[Term],
    parameter: int,
    weight_sharing: str = "expand",
) -> tuple[Array, Array]:
    """`A` and `G` with every column of the loss factor."""
    columns = [
        cotangents(trace, terms, parameter, values)
        for values in unit_columns(trace)
    ]
    return (
        input_factor(
            trace.inputs[parameter], example_weights(terms), weight_sharing
        ),
        output_factor(columns, weight_sharing),
    )


def pi(left: Array, right: Array) -> float:
    """`√((tr A / n) / (tr G / m))`."""
    return np.sqrt(
        (np.trace(left) / len(left)) / (np.trace(right) / len(right))
    )


def factored_inverses(
    left: Array, right: Array, damping: float
) -> tuple[Array, Array]:
    """`(A + π√λ I)⁻¹` and `(G + √λ/π I)⁻¹`."""
    ratio, root = pi(left, right), np.sqrt(damping)
    return (
        np.linalg.inv(left + ratio * root * np.eye(len(left))),
        np.linalg.inv(right + root / ratio * np.eye(len(right))),
    )


class Average:
    """An exponential average as what it means: a weighted mean of the past."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.values: list[Array] = []

    def add(self, value: Array) -> None:
        self.values.append(value)

    def mean(self) -> Array:
        age = np.arange(len(self.values))[::-1]
        weights = self.decay**age
        return sum(
            w * value
            for w, value in zip(
                weights / weights.sum(), self.values, strict=True
            )
        )


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping `relative · typical eigenvalue` at first, then adapted."""

    relative: float
    decay: float
    period: int
    minimum: float
    maximum: float
    inverse_ratio: float = 1.0


@dataclass
class Settings:
    """Options of `ReferenceKFAC`; `None` is what the model determines."""

    learning_rate: float | None
    momentum: float | None
    damping: float | LevenbergMarquardt
    factor_decay: float
    curvature_period: int = 1
    inverse_period: int = 1
    norm_constraint: float | None = None
    weight_decay: float | None = None
    l2_kernel: float = 0.0
    l2_bias: float = 0.0
    weight_sharing: str = "expand"
    spring: float = 0.0
    feature_scaled: tuple[int, ...] = ()
    model_period: int = 1
    model_decay: float = 0.0
    by_layer: bool = False
    samples: int = 1
    spread: float = 1.0


def feature_scales(moment: Array, magnitude: Array) -> Array:
    """`(E x² / E|x|)²` over the largest; one for what is zero nearly always."""
    square = np.diag(moment)
    scales = (square / magnitude) ** 2
    rare = magnitude**2 < 0.05 * square
    return np.where(rare, 1.0, scales / scales[~rare].max())


@dataclass
class ReferenceKFAC:
    """Whole K-FAC steps with the exact Fisher, on parameters as matrices."""

    network: Network
    settings: Settings
    iteration: int = 0
    damping: float | None = None
    ratio: float | None = None
    averages: list[tuple[Average, Average]] = field(default_factory=list)
    magnitudes: list[Average] = field(default_factory=list)
    metrics: list[Array] = field(default_factory=list)
    quotients: Array = field(default_factory=lambda: np.zeros((0, 0)))
    quotient_weights: Array = field(default_factory=lambda: np.zeros((0, 0)))
    bounded: int = 0
    inverses: list[tuple[Array, Array]] = field(default_factory=list)
    velocities: list[Array] = field(default_factory=list)
    coefficients: Array | None = None
    inverted_at: float = 0.0
    previous: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        decay = self.settings.factor_decay
        matrices = self.network.matrices
        self.averages = [(Average(decay), Average(decay)) for _ in matrices]
        self.magnitudes = [Average(decay) for _ in matrices]
        self.velocities = [np.zeros_like(m) for m in matrices]
        self.previous = [np.zeros_like(m) for m in matrices]
        size = 1 + (len(matrices) if self.settings.by_layer else 1)
        self.quotients = np.zeros((size, size))
        self.quotient_weights = np.zeros((size, size))

    # Regularizers: l2 ‖w‖² has gradient 2 l2 w and curvature 2 l2.

    def _ridge(self, parameter: int) -> Array:
        ridge = np.full(
            self.network.matrices[parameter].shape,
            2.0 * self.settings.l2_kernel,
        )
        if self.network.biased[parameter]:
            ridge[-1] = 2.0 * self.settings.l2_bias
        return ridge

    def _loss(self, network: Network, x: Array, terms: Sequence[Term]) -> float:
        penalty = sum(
            0.5 * np.sum(self._ridge(i) * m**2)
            for i, m in enumerate(network.matrices)
        )
        return fisher.loss(network.trace(x), terms) + penalty

    def _scales(self) -> list[Array]:
        """The metric of the damping of every matrix's rows."""
        return [
            feature_scales(a.mean(), magnitude.mean())
            if i in self.settings.feature_scaled
            else np.ones(len(a.mean()))
            for i, ((a, _), magnitude) in enumerate(
                zip(self.averages, self.magnitudes, strict=True)
            )
        ]

    def _factors(self) -> list[tuple[Array, Array]]:
        """`D^-½ A D^-½` and G."""
        roots = [np.sqrt(d) for d in self._scales()]
        return [
            (a.mean() / np.outer(root, root), g.mean())
            for (a, g), root in zip(self.averages, roots, strict=True)
        ]

    def _mean_eigenvalue(self) -> float:
        """The harmonic mean over all parameters of their blocks' means."""
        sizes = np.array([m.size for m in self.network.matrices], float)
        traces = np.array(
            [np.trace(a) * np.trace(g) for a, g in self._factors()]
        )
        return sizes.sum() / np.sum(sizes**2 / traces)

    def _refresh(self) -> None:
        """The block's damping includes the regularizer of its kernel."""
        damping, rule = self.damping, self.settings.damping
        if isinstance(rule, LevenbergMarquardt):
            damping = damping * rule.inverse_ratio
        self.inverted_at = damping
        damping = damping + 2.0 * self.settings.l2_kernel
        self.metrics = self._scales()
        self.inverses = []
        for (a, g), scales in zip(self._factors(), self.metrics, strict=True):
            left, right = factored_inverses(a, g, damping)
            root = np.sqrt(scales)
            self.inverses.append((left / np.outer(root, root), right))

    def _average(self, gram: Array, norms: Array) -> Array:
        """Averages `Q_ij / (n_i n_j)` where no direction is zero."""
        outer = np.outer(norms, norms)
        period = self.settings.model_period
        if self.iteration % period == 0:
            span = max(0.2 * self.iteration / period, 1.0)
            decay = min(1.0 - 1.0 / span, self.settings.model_decay)
            seen = outer > 0
            for total, new in (
                (self.quotients, gram[seen] / outer[seen]),
                (self.quotient_weights, 1.0),
            ):
                total[seen] = decay * total[seen] + (1.0 - decay) * new
        known = self.quotient_weights > 0
        mean = np.zeros_like(outer)
        mean[known] = self.quotients[known] / self.quotient_weights[known]
        return mean * outer

    def _choose(self, gram: Array, slopes: Array) -> Array:
        """Minimises `bᵀc + ½ cᵀQc` over the free coefficients.

        With both free, a momentum outside [0, 1] is at the bound instead.
        """
        rate, momentum = self.settings.learning_rate, self.settings.momentum
        fixed = np.array([rate, momentum], dtype=object)
        free = [i for i in range(2) if fixed[i] is None]
        c = np.array([0.0 if v is None else v for v in fixed], float)
        if gram[1, 1] == 0.0 and 1 in free:
            free.remove(1)  # There is no previous update yet.
        if free:
            rest = slopes[free] + gram[np.ix_(free, range(2))] @ c
            c[free] = -np.linalg.solve(gram[np.ix_(free, free)], rest)
        if len(free) == 2 and c[1] < 0.0:
            return np.array([-slopes[0] / gram[0, 0], 0.0])
        if len(free) == 2 and c[1] > 1.0:
            return np.array([-(slopes[0] + gram[0, 1]) / gram[0, 0], 1.0])
        return c

    def _choose_by_layer(self, gram: Array, slopes: Array) -> Array:
        """The common rate and a deviation e of each layer from it.

        `(Q + (1 + 2 L/n) diag Q) e = −(b + Q c)` over the L layers, c being the
        common rate and the momentum, n the samples in Q. No rate differs from
        the common one by more than a factor.
        """
        layers = len(slopes) - 1
        weight = 1.0 + 2.0 * layers / self.settings.samples
        common = np.zeros((layers + 1, 2))
        common[:layers, 0] = common[layers, 1] = 1.0
        c = common @ self._choose(common.T @ gram @ common, slopes @ common)
        own = gram[:layers, :layers]
        rest = (slopes + gram @ c)[:layers]
        bounds = c[0] / self.settings.spread, c[0] * self.settings.spread
        c[:layers] -= np.linalg.solve(
            own + weight * np.diag(np.diag(own)), rest
        )
        inside = np.clip(c[:layers], min(bounds), max(bounds))
        self.bounded += int(np.sum(inside != c[:layers]))
        c[:layers] = inside
        return c

    def step(self, x: Array, terms: Sequence[Term]) -> list[Array]:
        """One step on a batch; returns the new parameters."""
        settings, count = self.settings, len(self.network.matrices)
        trace = self.network.trace(x)
        old = [m.copy() for m in self.network.matrices]
        gradients = [
            fisher.gradient(trace, terms, i) + self._ridge(i) * old[i]
            for i in range(count)
        ]
        if self.iteration % settings.curvature_period == 0:
            for i, (left, right) in enumerate(self.averages):
                a, g = exact_factors(trace, terms, i, settings.weight_sharing)
                left.add(a)
                right.add(g)
                self.magnitudes[i].add(
                    input_magnitude(
                        trace.inputs[i],
                        example_weights(terms),
                        settings.weight_sharing,
                    )
                )
        rule = settings.damping
        if not isinstance(rule, LevenbergMarquardt):
            self.damping = rule
        elif self.damping is None:
            self.damping = rule.relative * self._mean_eigenvalue()
        if self.iteration == 0:
            self._refresh()
        # SPRING: (F + λD) φ = ∇ + λ μ φ₋₁.
        pull = settings.spring * self.inverted_at
        pulled = [
            gradient + pull * d[:, None] * previous
            for gradient, previous, d in zip(
                gradients, self.previous, self.metrics, strict=True
            )
        ]
        directions = [
            -left @ each @ right
            for each, (left, right) in zip(pulled, self.inverses, strict=True)
        ]
        self.previous = [-direction for direction in directions]

        def flat(parts: Sequence[Array]) -> Array:
            return np.concatenate([part.ravel() for part in parts])

        zero = [np.zeros_like(m) for m in old]
        parts = [directions]
        if settings.by_layer:
            parts = [
                [d if i == j else z for j, (d, z) in enumerate(pairs)]
                for i, pairs in enumerate(
                    [list(zip(directions, zero, strict=True))] * count
                )
            ]
        rows = [flat(part) for part in parts]
        basis = np.stack([*rows, flat(self.velocities)])
        metric = fisher.dense(trace, terms)
        scales = flat(
            [
                np.broadcast_to(d[:, None], m.shape)
                for d, m in zip(self.metrics, old, strict=True)
            ]
        )
        ridge = flat([self._ridge(i) for i in range(count)])
        ridge += self.damping * scales
        squares = [-flat(pulled) @ row for row in rows]
        norms = np.sqrt([*squares, scales @ basis[-1] ** 2])
        gram = self._average(basis @ metric @ basis.T, norms)
        damped = gram + (basis * ridge) @ basis.T
        slopes = basis @ flat(gradients)
        choose = self._choose_by_layer if settings.by_layer else self._choose
        c = choose(damped, slopes)
        if settings.norm_constraint is not None:
            norm = c @ gram @ c
            if norm > settings.norm_constraint:
                c = c * np.sqrt(settings.norm_constraint / norm)
        mean = c[0]
        if settings.by_layer:
            mean = slopes[:-1] @ c[:-1] / slopes[:-1].sum()
        self.coefficients = np.array([mean, c[-1] + settings.spring])
        rates = c[:-1] if settings.by_layer else np.repeat(c[:1], count)
        self.velocities = [
            rate * d + c[-1] * v
            for rate, d, v in zip(
                rates, directions, self.velocities, strict=True
            )
        ]
        shrink = 1.0
        if settings.weight_decay is not None:
            rate = settings.learning_rate
            shrink -= settings.weight_decay * (1.0 if rate is None else rate)
        new = [
            shrink * w + update
            for w, update in zip(old, self.velocities, strict=True)
        ]
        before = self._loss(self.network, x, terms)
        self.network = self.network.with_matrices(new)
        if (
            isinstance(rule, LevenbergMarquardt)
            and self.iteration % rule.period == 0
        ):
            change = self._loss(self.network, x, terms) - before
            model = slopes @ c + 0.5 * c @ damped @ c
            share = (c @ gram @ c) / (c @ damped @ c)
            self._adapt(rule, change / model, share)
        # After the step: its batch serves the next steps' inverses.
        if self.iteration and self.iteration % settings.inverse_period == 0:
            self._refresh()
        self.iteration += 1
        return new

    def _adapt(
        self, rule: LevenbergMarquardt, ratio: float, share: float
    ) -> None:
        """A damping that dominates the model falls to a tenth at once."""
        self.ratio = ratio
        if ratio > 0.75:
            self.damping *= 0.1 if share < 0.5 else rule.decay
        elif ratio < 0.25:
            self.damping /= rule.decay
        else:
            return
        scale = self._mean_eigenvalue()
        self.damping = np.clip(
            self.damping, rule.minimum * scale, rule.maximum * scale
        )
