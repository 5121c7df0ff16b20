"""One data set among many clients, and the rounds in which some of them train on their own.

The splits are those of the federated learning literature: examples dealt out evenly, sorted into
shards of few classes (McMahan et al. 2017, arXiv:1602.05629, section 3), or with a mixture of
classes for each client, drawn from a Dirichlet distribution (Hsu, Qi and Brown 2019,
arXiv:1909.06335, section 3).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from fmjax.data.batches import BatchStream, Planned, check_options
from fmjax.data.columns import Columns, update
from fmjax.data.sampled import drawn


def even_split(size: int, clients: int, *, seed: int = 0) -> list[np.ndarray]:
    """The examples dealt out at random: int64 [N / clients] each, sizes differing by one at most.

    Raises:
      ValueError: fewer examples than clients.
    """
    _check_split(size, clients)
    order = np.random.default_rng(seed).permutation(size)
    return [np.sort(part) for part in np.array_split(order, clients)]


def shard_split(
    labels: np.ndarray, clients: int, *, shards: int = 2, seed: int = 0
) -> list[np.ndarray]:
    """The examples sorted by class, cut into ``clients * shards`` runs, `shards` for each client.

    Args:
      labels: int [N].
      clients: how many.
      shards: runs of each client, about the number of its classes.
      seed: of the order within a class, and of who gets which.

    Raises:
      ValueError: fewer examples than shards.
    """
    _check_split(len(labels), clients * shards)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    runs = np.array_split(order, clients * shards)
    dealt = rng.permutation(len(runs)).reshape(clients, shards)
    return [np.sort(np.concatenate([runs[i] for i in mine])) for mine in dealt]


def dirichlet_split(
    labels: np.ndarray, clients: int, *, alpha: float, seed: int = 0
) -> list[np.ndarray]:
    """As many examples for each client, whose classes follow a mixture of its own.

    The mixture is drawn from ``Dirichlet(alpha * p)``, p being the classes' shares of all examples:
    a small alpha gives clients of one class, a large one clients that are all alike. Examples are
    drawn without replacement, a class that has run out leaving the mixture. The rest of a division
    is left over.

    Args:
      labels: int [N].
      clients: how many.
      alpha: concentration, above 0.
      seed: of the mixtures and draws.

    Raises:
      ValueError: fewer examples than clients, or an alpha that is not positive.
    """
    _check_split(len(labels), clients)
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    pools = [list(rng.permutation(np.flatnonzero(labels == label))) for label in classes]
    left = counts.copy()
    shares = []
    for _ in range(clients):
        mixture = rng.dirichlet(alpha * counts / counts.sum())
        wanted, mine = len(labels) // clients, []
        while wanted:
            mixture = np.where(left > 0, mixture, 0.0)
            if not mixture.sum() > 0:  # its classes are all gone
                mixture = left.astype(float)
            # What a class cannot give is drawn again, from those that still can.
            draws = np.minimum(rng.multinomial(wanted, mixture / mixture.sum()), left)
            for label, count in enumerate(draws):
                mine += [pools[label].pop() for _ in range(count)]
            left -= draws
            wanted -= int(draws.sum())
        shares.append(np.sort(np.array(mine, np.int64)))
    return shares


def _check_split(size: int, parts: int) -> None:
    if not 1 <= parts <= size:
        raise ValueError(f"{size} examples do not make {parts} parts of at least one")


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """Who takes part in round k, and on which examples each step trains: by k and the seed.

    Attributes:
      shares: the examples of each client.
      slots: clients in a batch.
      independent: whether each client is drawn with probability `rate`, or `sampled` of them.
      rate, sampled: see `client_batches`.
      batch_size, epochs, steps, dropout, seed: see `client_batches`.
      lengths: in tokens, of each ragged part.
      total: rounds in the stream.
    """

    shares: tuple[np.ndarray, ...]
    slots: int
    sampled: int
    rate: float | None
    batch_size: int
    epochs: int
    steps: int
    dropout: float
    seed: int
    lengths: tuple[int, ...]
    total: int

    def __len__(self) -> int:
        return self.total

    @property
    def batches_per_epoch(self) -> int:
        return max(1, round(len(self.shares) / self.sampled))

    def clients(self, index: int) -> np.ndarray:
        """int64 [slots]: who takes part in a round, -1 for nobody."""
        rng = np.random.default_rng([self.seed, index])
        if self.rate is None:
            chosen = np.full(self.slots, -1, np.int64)
            chosen[: self.sampled] = rng.choice(len(self.shares), self.sampled, replace=False)
        else:
            chosen = drawn(rng, len(self.shares), self.rate, self.slots)
        return np.where(rng.random(self.slots) < self.dropout, -1, chosen)

    def __getitem__(self, index: int) -> Planned:
        rows = np.full((self.slots, self.steps, self.batch_size), -1, np.int64)
        for slot, client in enumerate(self.clients(index)):
            if client >= 0:
                rng = np.random.default_rng([self.seed, index, client])
                rows[slot] = self._steps(self.shares[client], rng)
        return Planned(index, self.lengths, rows)

    def _steps(self, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 [steps, batch]: its epochs one after the other, each in an order of its own."""
        a_pass = -(-len(share) // self.batch_size) * self.batch_size
        rows = np.full(max(self.epochs * a_pass, self.steps * self.batch_size), -1, np.int64)
        for epoch in range(self.epochs):
            rows[epoch * a_pass :][: len(share)] = rng.permutation(share)
        return rows[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)


def client_batches(
    data: Columns,
    shares: Sequence[np.ndarray],
    *,
    clients_per_round: int,
    batch_size: int,
    epochs: int = 1,
    max_steps: int | None = None,
    independent: bool = False,
    slots: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    rounds: int | None = None,
    length: int | Sequence[int] | None = None,
    prefetch: int = 2,
) -> BatchStream:
    """A stream whose every batch is one round: the data of the clients that take part in it.

    Every leaf is [K, S, B, ...]: K clients, S steps, B examples. Rows of weight 0 fill the last
    batch of an epoch, the steps of a client that has fewer than others, and the place of a client
    that dropped out. ``client`` int32 [K] is each one's number, -1 for nobody.

    Args:
      data: N examples.
      shares: the examples of each client.
      clients_per_round: how many are drawn, each as likely as the others; with `independent` how
        many are expected.
      batch_size: B, of a client's steps.
      epochs: passes of a client over its own examples in a round.
      max_steps: S at most; steps past it are left out, of the longest clients.
      independent: each client takes part independently with the same probability, as accounts of
        privacy suppose.
      slots: K; by default `clients_per_round`, which with `independent` is too few: see
        `fmjax.data.sampled.capacity_of`.
      dropout: share of the drawn clients that never answer.
      seed: of the draws and orders.
      rounds: None for a stream that never ends.
      length: tokens of each ragged part; by default those of the longest example.
      prefetch: rounds that a thread prepares ahead.

    Raises:
      ValueError: clients without examples (all are named), examples that are not there, or numbers
        out of their ranges.
    """
    problems = check_options(
        batch_size=batch_size,
        seed=seed,
        epochs=rounds,
        process_index=0,
        process_count=1,
        prefetch=prefetch,
    )
    if empty := [client for client, share in enumerate(shares) if not len(share)]:
        problems.append(f"clients {empty} have no examples; leave them out of the shares")
    if outside := [
        client
        for client, share in enumerate(shares)
        if len(share) and (min(share) < 0 or max(share) >= len(data))
    ]:
        problems.append(f"clients {outside} have examples that are none of the {len(data)}")
    if not 1 <= clients_per_round <= len(shares):
        problems.append(
            f"clients_per_round={clients_per_round} must be at least 1 and at most the "
            f"{len(shares)} clients"
        )
    for name, value in [("epochs", epochs), ("max_steps", max_steps), ("slots", slots)]:
        if value is not None and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    if not 0 <= dropout < 1:
        problems.append(f"dropout={dropout} must be in [0, 1)")
    if slots is not None and slots < clients_per_round:
        problems.append(f"slots={slots} do not hold clients_per_round={clients_per_round}")
    if independent and slots is None:
        problems.append("independent clients vary in number: give slots, such as capacity_of's")
    if problems:
        raise ValueError("; ".join(problems))
    longest = max(epochs * -(-len(share) // batch_size) for share in shares)
    digest = hashlib.sha256()
    update(digest, {str(client): np.asarray(share) for client, share in enumerate(shares)})
    lengths = data.chosen_lengths(length)
    source = Rounds(
        shares=tuple(np.asarray(share, np.int64) for share in shares),
        slots=clients_per_round if slots is None else slots,
        sampled=clients_per_round,
        rate=clients_per_round / len(shares) if independent else None,
        batch_size=batch_size,
        epochs=epochs,
        steps=longest if max_steps is None else min(longest, max_steps),
        dropout=dropout,
        seed=seed,
        lengths=lengths,
        total=sys.maxsize if rounds is None else rounds,
    )

    def assemble(planned: Planned, mine: slice) -> dict[str, np.ndarray]:
        rows = planned.rows[mine]  # [K, S, B]
        flat = data.assemble(rows.reshape(-1), planned.lengths)
        batch = {name: leaf.reshape(*rows.shape, *leaf.shape[1:]) for name, leaf in flat.items()}
        batch["client"] = source.clients(planned.number)[mine].astype(np.int32)
        return batch

    return BatchStream(
        source,
        assemble,
        shapes=[(source.slots, source.steps, batch_size, *lengths)],
        identity={
            "data": data.fingerprint,
            "shares": digest.hexdigest()[:16],
            **{
                field.name: getattr(source, field.name)
                for field in dataclasses.fields(source)
                if field.name not in ("shares", "total", "lengths")
            },
            "lengths": list(lengths),
        },
        process_index=0,
        process_count=1,
        prefetch=prefetch,
    )
