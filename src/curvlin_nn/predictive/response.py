"""From outputs to what is predicted: a model's outputs are terms of its likelihood, which says what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin_nn.errors import OutputError
from curvlin_nn.likelihoods import Likelihood


@dataclass(frozen=True)
class Response:
    """A likelihood with what it needs to know of a fit.

    Attributes:
        likelihood: the family.
        output_shape: tells that of the outputs of one sample, once there are some.
        sigma_noise: the noise scale, or one for each output of a term.
    """

    likelihood: Likelihood
    output_shape: Callable[[], tuple[int, ...]]
    sigma_noise: Float[Tensor, "*C"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs of one sample; one number counts as an axis of length one."""
        return self.output_shape() or (1,)

    @property
    def is_noisy(self) -> bool:
        """Whether targets scatter around `values` by additive noise."""
        return self.likelihood.has_additive_noise

    def linked(self, link: Callable[..., Tensor], *outputs: Float[Tensor, "*batch C"]) -> Tensor:
        """A function of terms, in the shape of the model's outputs."""
        rows = [self._rows(f) for f in outputs]
        found = link(*(self.likelihood.terms(f) for f in rows))
        return self.likelihood.outputs(found, rows[0]).reshape(*outputs[0].shape[:-1], *self.shape)

    def expected_link(
        self, name: str, mean: Float[Tensor, "N C"], spread: Float[Tensor, "N C"] | Float[Tensor, "N C C"]
    ) -> Tensor:
        """A closed form of the likelihood's expected link, by name, in the shape of the model's outputs.

        Args:
            name: of one of its approximations.
            mean: of Gaussian outputs.
            spread: their variances, or their covariances for an approximation that needs them.
        """
        if name in self.likelihood.link_approximations:
            return self.linked(self.likelihood.link_approximations[name], mean, spread)
        places = self._places(mean)
        covariance = spread[:, places[:, :, None], places[:, None, :]]
        approximation = self.likelihood.covariance_links[name]
        return self.linked(lambda terms: approximation(terms, covariance), mean)

    def needs_covariance(self, name: str) -> bool:
        """Whether an approximation of the expected link needs covariances, and not variances alone."""
        return name in self.likelihood.covariance_links

    def values(self, outputs: Float[Tensor, "S N C"]) -> Tensor:
        """What outputs stand for: probabilities or rates in the shape of the outputs, or one row of means."""
        if self.likelihood.has_link:
            return self.linked(self.likelihood.link, outputs)
        if self.likelihood.is_linear:
            return outputs
        terms = self.terms(outputs)
        return self.likelihood.link(terms).reshape(*outputs.shape[:2], -1)

    def targets(self, outputs: Float[Tensor, "S N C"], generator: torch.Generator | None) -> Tensor:
        """Draws of targets that scatter around `values` of the outputs."""
        values, terms = self.values(outputs), self.terms(outputs)
        unscaled = self.likelihood.draw(terms, terms, 1, generator).reshape(values.shape)
        return values + self._scales(values) * (unscaled - values)

    def moments(
        self, mean: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D D"]]:
        """Mean and covariance of `values` for Gaussian outputs."""
        if self.likelihood.is_linear:
            return mean, covariance
        return self.likelihood.moments(*self._number_by_number(mean, covariance))

    def noise_covariance(
        self, mean: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"] | None
    ) -> Float[Tensor, "*N D D"]:
        """The expected covariance of targets given all outputs of a sample; one where outputs do not matter."""
        if not self.likelihood.is_linear:
            assert covariance is not None
            mean, covariance = self._number_by_number(mean, covariance)
        noise = self.likelihood.noise_covariance(mean, covariance)
        scales = self._scales(mean)
        return (scales[:, None] * scales if scales.ndim else scales.square()) * noise

    def _scales(self, values: Float[Tensor, "*batch C"]) -> Float[Tensor, "*C"]:
        """The noise scale of each of some values, which stand term by term; or the one of all."""
        sigma = self.sigma_noise.to(values)
        return sigma.repeat(values.shape[-1] // len(sigma)) if sigma.ndim else sigma

    def noise_at(self, outputs: Float[Tensor, "S N C"]) -> Float[Tensor, "S N D D"]:
        """The covariance of targets at outputs that are known."""
        f = outputs.flatten(0, 1)
        certain = None if self.likelihood.is_linear else f.new_zeros(*f.shape, f.shape[-1])
        noise = self.noise_covariance(f, certain)
        return noise.expand(len(f), *noise.shape[-2:]).unflatten(0, outputs.shape[:2])

    def terms(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "B R E"]:
        """Outputs term by term."""
        return self.likelihood.terms(self._rows(outputs))

    def _number_by_number(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The first numbers of all terms, then the second ones, and so on."""
        order = self._places(mean).mT.flatten()
        return mean[:, order], covariance[:, order][:, :, order]

    def _places(self, outputs: Float[Tensor, "N C"]) -> Int[Tensor, "R E"]:
        """Where the numbers of each term stand among the outputs of a sample."""
        places = torch.arange(outputs.shape[-1], device=outputs.device)
        return self.likelihood.terms(self._rows(places)).squeeze(0)

    def _rows(self, outputs: Float[Tensor, "*batch C"]) -> Float[Tensor, "B ..."]:
        """Outputs in the shape that the model gave them in `fit`."""
        n_outputs = torch.Size(self.shape).numel()
        if outputs.shape[-1] != n_outputs:
            raise OutputError(
                f"model outputs must have {n_outputs} numbers for each sample as in fit, found {outputs.shape[-1]}"
            )
        return outputs.reshape(-1, *self.shape)
