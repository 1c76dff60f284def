"""RQ-VAE: residual quantisation of vectors that an autoencoder learns for it.

    z = encoder(x),  r_1 = z,  code_l = argmin_c |r_l - e_lc|^2,  r_{l+1} = r_l - e_l[code_l],  x' = decoder(sum_l e_l)
    loss = |x - x'|^2 + beta sum_l |r_l - sg(e_l[code_l])|^2,  the gradient passing the codes straight through

After Lee et al., "Autoregressive image generation using residual quantization" (arXiv 2203.01941), for items as in
TIGER (arXiv 2305.05065). Departures from TIGER: the codebooks follow the mean of what chose them (exponential moving
averages, van den Oord et al. 2017, appendix A) instead of a gradient; the autoencoder is first trained without
quantisation, so that k-means sets up the codebooks on vectors that mean something; and after each epoch codes that no
item chose are moved to residuals of items drawn at random (dead-code revival), but for the last epochs.

Shapes: N items, D dimensions of x, Z of z, B items of a batch, L levels, C codes per level.
"""

import logging
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sagerec.actions.semantic_ids.quantisers import Quantisation, kmeans, mean_square, perplexity

logger = logging.getLogger(__name__)
BATCHES, SMALLEST_BATCH, LARGEST_BATCH = 32, 16, 256
"""Batches of an epoch, as far as these sizes allow."""
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4
DECAY = 0.95
"""Of the moving averages that the codebooks are."""
WARMUP_SHARE, SETTLE_SHARE = 0.2, 0.2
"""Shares of the epochs: without quantisation at the start, without revival at the end."""


class Quantised(NamedTuple):
    """A batch after the codebooks."""

    codes: Tensor
    """(B, L) int64."""
    residuals: Tensor
    """(L, B, Z) what each level was given."""
    chosen: Tensor
    """(L, B, Z) the centroids that it chose."""


class RqVae(nn.Module):
    """Encoder and decoder: two hidden layers each, of `width` and half of it."""

    def __init__(self, dimensions: int, width: int, latent: int) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        self.encoder = nn.Sequential(
            nn.Linear(dimensions, width), nn.ReLU(), nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, inner), nn.ReLU(), nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, dimensions)
        )


def quantise(z: Tensor, codebooks: Tensor) -> Quantised:
    """Residual quantisation of z (B, Z) by codebooks (L, C, Z), the nearest centroid at each level."""
    residual, codes, residuals, chosen = z, [], [], []
    for centroids in codebooks:
        code = ((centroids**2).sum(1) - 2 * residual @ centroids.T).argmin(dim=1)
        codes.append(code)
        residuals.append(residual)
        chosen.append(centroids[code])
        residual = residual - centroids[code]
    return Quantised(torch.stack(codes, dim=1), torch.stack(residuals), torch.stack(chosen))


def vae_loss(x: Tensor, decoded: Tensor, quantised: Quantised, *, commitment: float) -> Tensor:
    """Mean over the batch of |x - x'|^2 + beta sum_l |r_l - sg(e_l)|^2: x and decoded (B, D)."""
    reconstruction = ((x - decoded) ** 2).sum(1).mean()
    return reconstruction + commitment * ((quantised.residuals - quantised.chosen.detach()) ** 2).sum((0, 2)).mean()


class MovingCodebooks:
    """Codebooks that are moving averages: e_lc = sums_lc / counts_lc, with sums and counts decayed at each batch."""

    def __init__(self, codebooks: Tensor, counts: Tensor) -> None:
        """Centroids (L, C, Z) and the number of items (L, C) that each stands for in a batch."""
        self.codebooks, self.counts = codebooks, counts
        self.sums = codebooks * counts.unsqueeze(2)

    def update(self, quantised: Quantised) -> None:
        """Follow what chose each code of a batch; codes that nothing chose stay where they are."""
        for level, (codes, residuals) in enumerate(zip(quantised.codes.T, quantised.residuals.detach(), strict=True)):
            added = torch.bincount(codes, minlength=self.counts.shape[1])
            self.counts[level].mul_(DECAY).add_(added, alpha=1 - DECAY)
            self.sums[level].mul_(DECAY).index_add_(0, codes, residuals, alpha=1 - DECAY)
            self.codebooks[level] = self.sums[level] / self.counts[level].clamp(min=1e-30).unsqueeze(1)

    def revive(self, level: int, dead: Tensor, residuals: Tensor, count: float) -> None:
        """Move the codes `dead` (n,) to residuals (n, Z), each with the weight of `count` items."""
        self.codebooks[level, dead] = residuals
        self.counts[level, dead] = count
        self.sums[level, dead] = residuals * count


def rq_vae(
    vectors: np.ndarray,
    *,
    levels: int,
    codebook_size: int,
    width: int,
    latent: int,
    epochs: int,
    commitment: float,
    seed: int,
) -> Quantisation:
    """Train an RQ-VAE on `vectors` (N, D), on the CPU, and quantise them; the errors are those of the decoder's output.

    Where the items are fewer than `codebook_size`, a level has as many codes as items.
    """
    x = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    size, scale = min(codebook_size, len(x)), mean_square(vectors)
    batch_size = min(max(len(x) // BATCHES, SMALLEST_BATCH), LARGEST_BATCH)
    share = min(batch_size / len(x), 1)
    warmup, settled = max(1, round(WARMUP_SHARE * epochs)), epochs - round(SETTLE_SHARE * epochs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RqVae(x.shape[1], width, latent)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        moving = None
        for epoch in range(epochs):
            if epoch == warmup:
                moving = _begin_codebooks(encode(model, x), levels, size, share, seed)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            total, used = 0.0, torch.zeros(levels, size, dtype=torch.bool)
            for batch in torch.split(torch.randperm(len(x)), batch_size):
                z = model.encoder(x[batch])
                if moving is None:
                    loss = ((x[batch] - model.decoder(z)) ** 2).sum(1).mean()
                else:
                    quantised = quantise(z, moving.codebooks)
                    through = z + (quantised.chosen.sum(0) - z).detach()
                    loss = vae_loss(x[batch], model.decoder(through), quantised, commitment=commitment)
                    used[torch.arange(levels), quantised.codes] = True
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if moving is not None:
                    moving.update(quantised)
                total += loss.item() * len(batch) / len(x)
            if moving is not None and epoch < settled:
                _revive_dead(moving, used, encode(model, x), share)
            if (epoch + 1) % 20 == 0 or epoch + 1 == epochs:
                logger.info(
                    "rq-vae epoch %d of %d: loss %.4f of %.4f, codes in use %s",
                    *(epoch + 1, epochs, total, scale, used.sum(1).tolist() if moving else "none yet"),
                )
        codebooks = (
            moving.codebooks if moving else _begin_codebooks(encode(model, x), levels, size, share, seed).codebooks
        )
    with torch.no_grad():
        quantised = quantise(encode(model, x), codebooks)
        partial = quantised.chosen.cumsum(0)
        errors = [mean_square((x - model.decoder(sums)).numpy()) / scale for sums in partial]
    codes = quantised.codes.numpy().astype(np.int32)
    network = {name: value.numpy() for name, value in model.state_dict().items()}
    return Quantisation(codes, codebooks.numpy(), errors, [perplexity(c) for c in codes.T], network)


@torch.no_grad()
def encode(model: RqVae, x: Tensor) -> Tensor:
    """The vectors z (N, Z) of x (N, D)."""
    return torch.cat([model.encoder(part) for part in torch.split(x, 8 * LARGEST_BATCH)])


def load_rq_vae(network: dict[str, np.ndarray]) -> RqVae:
    """The autoencoder of saved weights."""
    width, dimensions = network["encoder.0.weight"].shape
    model = RqVae(dimensions, width, len(network["encoder.4.weight"]))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in network.items()})
    return model


def _begin_codebooks(z: Tensor, levels: int, size: int, share: float, seed: int) -> MovingCodebooks:
    """Codebooks by k-means on the residuals of z (N, Z), each centroid with the weight of its items in a batch."""
    residual, codebooks, counts = z.numpy().copy(), [], []
    for level in range(levels):
        centroids, chosen = kmeans(residual, size, seed + level)
        codebooks.append(centroids)
        counts.append(np.bincount(chosen, minlength=size) * share)
        residual -= centroids[chosen]
    return MovingCodebooks(torch.from_numpy(np.stack(codebooks)), torch.from_numpy(np.stack(counts)).float())


def _revive_dead(moving: MovingCodebooks, used: Tensor, z: Tensor, count: float) -> None:
    """Move codes not `used` (L, C) in the epoch to residuals of items drawn at random, first level first."""
    for level in range(len(used)):
        dead = (~used[level]).nonzero()[:, 0]
        if len(dead):
            residuals = quantise(z, moving.codebooks[: level + 1]).residuals[-1]
            drawn = torch.randint(len(z), (len(dead),))
            moving.revive(level, dead, residuals[drawn], count)
