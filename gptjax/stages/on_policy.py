"""What the stages share that learn from their policy's own replies: an iteration of them is drawn, judged, and learned
from.

The policy is a plain decoder at the root of the tree of parameters; its `reference`, frozen, and the `reward` model, if
there is one, stand beside it on the same mesh. Dropout is off: what is scored must be what was sampled from.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from gptjax.config import Config, ModelConfig, RewardedConfig
from gptjax.data.prompted import Prompt, Prompts, open_prompts
from gptjax.data.rows import PADDING, Rows
from gptjax.data.sources import TextSource
from gptjax.data.stream import TokenStream
from gptjax.errors import UserError
from gptjax.infer.engine import Engine
from gptjax.infer.sampling import Sampling
from gptjax.model.accounting import Reading
from gptjax.model.loss import drawn_log_probs, log_probs
from gptjax.sharding.mesh import MESH_AXES
from gptjax.sharding.mesh import check as check_mesh
from gptjax.sharding.rules import Layout
from gptjax.stages.assistant import Assistant
from gptjax.stages.rewards import Judge, ask, function_digest, is_function, load_function
from gptjax.stages.rollout import Drawn, Rollout, Rollouts, Stopwatch, draw
from gptjax.train.fingerprint import fingerprint
from gptjax.train.step import narrow

if TYPE_CHECKING:
    from gptjax.stages.reward import Reward
    from gptjax.stages.scorer import Scorer

REFERENCE, REWARD = "reference", "reward"


class Judged(NamedTuple):
    """Of replies [b, T], float32; 0 where no target is."""

    logprobs: Any
    """By the policy as it draws, in nats."""
    plain: Any
    """By the policy's full softmax, as an engine tells them."""
    ref_logprobs: Any
    """By the reference, as the policy draws."""
    values: Any
    """Of the state before each target, where there is a value model; else None."""
    scores: Any
    """[b], by the reward model; None where a function judges."""


class OnPolicy(Assistant[Prompts]):
    """A policy that answers prompts and learns from what its replies are worth."""

    config: RewardedConfig
    on_policy = True
    maxima = ("ratio_error",)
    group = 1  # replies to each prompt of an iteration
    unit_reward = False

    # Parameters

    def init(self, key: Array) -> Any:
        policy = super().init(key)
        more: dict[str, Any] = {REFERENCE: narrow(policy, self.network.plain_model.dtype)}
        if self.reward_model:
            more[REWARD] = self.reward_model.init(key)
        return policy | more

    def is_frozen(self, name: str) -> bool:
        return name.split("/")[0] in (REFERENCE, REWARD)

    def of_weights(self, load: Callable[[Any], Any], places: Any) -> Any:
        """Policy and reference are those weights, the reward model those of its run."""
        policy = self.policy_of(places)
        made = load(policy) if policy else {}
        return made | {name: self.weights_of(name, load, places[name]) for name in self.beside if name in places}

    @property
    def beside(self) -> tuple[str, ...]:
        return REFERENCE, REWARD

    def weights_of(self, name: str, load: Callable[[Any], Any], places: Any) -> Any:
        """The parameters of one of these as a run starts."""
        if name == REWARD:
            assert self.scorer
            return self.scorer.restore(places)
        return load(places)

    def policy_of(self, params: Any) -> Any:
        return {name: part for name, part in params.items() if name not in self.beside}

    # What judges

    @cached_property
    def reward_model(self) -> "Reward | None":
        """Its shapes; None where a function judges. Of a run that is not there, as where a layout is planned, those of
        the policy with a scalar head: `scorer` is what refuses it."""
        if is_function(self.config.reward):
            return None
        from gptjax.stages.scorer import unscored  # which opens runs of any stage, and so imports all of them

        return unscored(self.config, self.platform, self.layout)

    @property
    def judging(self) -> tuple[Reading, ...]:
        policy = Reading(self.config.model, trained=False)
        models = [policy, replace(policy, name=REFERENCE)]
        if self.reward_model:
            read = self._as_read(self.reward_model.config.model)
            models.append(Reading(read, REWARD, trained=False, predicts=False))
        return tuple(models)

    def _as_read(self, model: ModelConfig) -> ModelConfig:
        """A model that may have a longer context, as it reads these rows."""
        return replace(model, seq_len=self.config.model.seq_len)

    @property
    def flops(self) -> dict[str, float]:
        """Prompts and replies are taken to be as long as they may. The last token of a reply is fed to nobody, and the
        prompt's are asked for nothing."""
        c, (prompt, reply) = self.config, self.config.text_tokens
        fed = Reading(replace(c.model, seq_len=prompt + reply - 1), trained=False, predicts=False)
        drawn = fed.flops + 2 * reply * c.model.vocab_size * c.model.embed_dim
        judged = sum(each.flops for each in self.judging)
        return {"rollout": c.rollout.episodes * drawn, "judging": c.rollout.episodes * judged} | super().flops

    @cached_property
    def scorer(self) -> "Scorer | None":
        """The reward model; None where a function judges."""
        if is_function(self.config.reward):
            return None
        from gptjax.stages.scorer import load_scorer  # which opens runs of any stage, and so imports all of them

        return load_scorer(self.config.reward, self.layout, policy=self.config, unit=self.unit_reward)

    def pins(self, params: Any) -> dict[str, tuple[str, dict[str, str]]]:
        """The reward model's weights, and what its scores are measured from."""
        if REWARD not in params:
            return {}
        assert self.scorer
        prints = fingerprint(params[REWARD]) | {"scores": str(self.scorer.statistics)}
        return {"reward": (self.config.reward, prints)}

    @cached_property
    def _function(self) -> Judge:
        return load_function(self.config.reward)

    @cached_property
    def _gold(self) -> Judge | None:
        return load_function(self.config.gold, "gold") if self.config.gold else None

    def agree(self) -> None:
        self.scorer  # noqa: B018  whose checkpoint is that which the first process sees

    def check(self) -> None:
        super().check()
        self._gold  # noqa: B018  as the reward's function below
        if self.scorer is None:
            self._function  # noqa: B018  one that cannot be had is told of before there is a run folder
            return
        ours, theirs = self.known_tokenizer, self.scorer.tokenizer
        if ours.pieces != theirs.pieces or ours.files != theirs.files:
            raise UserError(
                f"reward = {self.config.reward}: its tokenizer is not that of init_from = {self.config.init_from}; "
                "train a reward model from the same run"
            )
        if self.scorer.config.model.seq_len < self.config.model.seq_len:
            raise UserError(
                f"model.seq_len = {self.config.model.seq_len}: the reward model {self.config.reward} reads "
                f"{self.scorer.config.model.seq_len}; nearest {self.scorer.config.model.seq_len}"
            )
        if self.layout is not None:
            self._require_fits(self.scorer.config, self.layout)

    def _require_fits(self, judge: Config, layout: Layout) -> None:
        """The reward model may have another size than the policy, on whose mesh it lies."""
        try:
            check_mesh(judge, tuple(layout.mesh.shape[axis] for axis in MESH_AXES))
        except UserError as error:
            raise UserError(f"reward = {self.config.reward}: its model does not fit the mesh: {error}") from None

    @property
    def beside_text(self) -> dict[str, str]:
        """The function that judges; a reward model is known by its weights (launch), and gold teaches nothing."""
        return {"reward": function_digest(self.config.reward)} if is_function(self.config.reward) else {}

    # Prompts and replies

    def _examples(self, source: TextSource) -> Prompts:
        return open_prompts(self.config.data, source, self.chat, self.config.model.seq_len, self.report)

    def facts(self) -> str:
        """What it learns, in words."""
        left_out = sum(self.training.left_out.values())
        return (
            f"{len(self.training):,} training prompts"
            + f", {self.training.num_cut:,} cut" * bool(self.training.num_cut)
            + f", {left_out:,} left out" * bool(left_out)
            + f"; judged by {self.config.reward}"
        )

    @property
    def epoch_tokens(self) -> int:
        raise ValueError("the length of such a run is in iterations")

    def prompt_of(self, episode: int) -> Prompt:
        """Prompts come in a new order in every pass over them; each is given to a whole group of episodes."""
        epoch, place = divmod(episode // self.group, self.training.num_rows)
        (index,) = self.training.epoch(self.config.data.seed, epoch).row(place)
        return self.training[index]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.config.rollout.temperature, self.config.rollout.top_k)

    @cached_property
    def _roller(self) -> Engine:
        rollout, alone = self.config.rollout, self._alone
        return Engine(
            self.network.decoder,
            None,
            slots=rollout.slots,
            steps=min(8, rollout.max_tokens),
            counts=(-(-rollout.slots // 8), rollout.slots),  # so that all programs are there after an iteration
            tokenizer=self.tokenizer,
            layout=None if alone else self.layout,
        )

    @property
    def _alone(self) -> bool:
        """Whether there is one device, on which an engine has faster programs."""
        return self.layout is None or self.layout.mesh.size == 1

    def engine_with(self, params: Any) -> Engine:
        """The engine with a policy's weights, laid out for it."""
        policy = self.policy_of(params)
        if self._alone and self.layout is not None:
            policy = jax.device_put(policy, SingleDeviceSharding(self.layout.mesh.devices.flat[0]))
        self._roller.params = policy
        return self._roller

    def replies(self, params: Any, prompts: Sequence[Prompt], seed: int, start: int) -> Rollout:
        """One to each prompt; see `draw`."""
        engine, most = self.engine_with(params), self.config.rollout.max_tokens
        made = draw(engine, [each.ids for each in prompts], self.ends, self.sampling, seed, start, most)
        engine.clear()
        return made

    # What they are worth

    def log_probs(self, params: Any, rows: Any) -> tuple[Array, Array]:
        """Of rows with tokens and targets [b, T]: log-probability of each target, and entropy of what it is drawn from,
        nats [b, T], by the policy as it draws; 0 where no target is."""
        c, rollout = self.config.model, self.config.rollout
        hidden, head, targets = self.network.before_head(params, Rows(rows.tokens, rows.targets), None)
        with jax.named_scope("loss"):
            how = c.vocab_size, c.loss_chunk, rollout.temperature, rollout.top_k
            found = drawn_log_probs(hidden, head, targets, *how)
            return self.network.in_order(found[0]), self.network.in_order(found[1])

    @cached_property
    def _judge_batch(self) -> Callable[[Any, Drawn], Judged]:
        """jit of (params, Drawn [b, ...]) -> Judged, whole on every process."""
        plain_too = self.config.rollout.temperature != 1 or self.config.rollout.top_k > 0

        def whole(params: Any, rows: Drawn) -> Judged:
            ours, reference = (self.log_probs(each, rows)[0] for each in (params, params[REFERENCE]))
            scores = self.scorer.score(params[REWARD], rows.tokens, rows.last) if self.scorer else None
            plain = self._plain(params, rows) if plain_too else ours
            return Judged(ours, plain, reference, self.values(params, rows), scores)

        return jax.jit(whole, out_shardings=self.layout.sharding(()) if self.layout else None)

    def _plain(self, params: Any, rows: Drawn) -> Array:
        c = self.config.model
        hidden, head, targets = self.network.before_head(params, Rows(rows.tokens, rows.targets), None)
        return self.network.in_order(log_probs(hidden, head, targets, c.vocab_size, c.loss_chunk))

    def random_replies(self, rng: np.random.Generator, lead: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets [*lead, T] of random ids: prompts and replies that fill the context by halves."""
        length = self.config.model.seq_len
        tokens = rng.integers(0, self.config.model.vocab_size, (*lead, length), np.int32)
        said = (np.arange(length) >= length // 2 - 1) & (np.arange(length) < length - 1)
        return tokens, np.where(said, np.roll(tokens, -1, -1), PADDING).astype(np.int32)

    def values(self, params: Any, rows: Any) -> Array | None:
        """float32 [b, T]; None without a value model."""
        return None

    def judge(self, params: Any, drawn: Drawn) -> Judged:
        """Of any number of replies, as numpy arrays."""
        size, count = self.config.micro_batch_size, len(drawn.last)
        found = []
        for start in range(0, count, size):
            part = jax.tree.map(lambda leaf, start=start: _filled(leaf[start : start + size], size), drawn)
            if self.layout is not None:
                part = jax.device_put(part, self.layout.sharding(("batch",)))
            found.append(jax.device_get(self._judge_batch(params, part)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)

    def scores(self, prompts: Sequence[Prompt], made: Rollout, found: Judged) -> np.ndarray:
        """float32 [E]: by the reward model or the function, before what is added for a missing end."""
        if found.scores is not None:
            return np.asarray(found.scores, np.float32)
        said = _said(prompts, made)
        return np.array(ask(self._function, said, f"reward {self.config.reward}"), np.float32)

    # An iteration

    def iteration(self, params: Any, start: int) -> tuple[Any, dict[str, float]]:
        """Rows [episodes, ...] to learn from, drawn from `params`, and figures of them. Raises UserError where
        what draws and what learns are not the same policy, or the function does not do."""
        watch = Stopwatch()
        prompts = [self.prompt_of(start + i) for i in range(self.config.rollout.episodes)]
        made = self.replies(params, prompts, self.config.train.seed, start)
        watch.lap("rollout_s")
        found = self.judge(params, made.drawn)
        scores = self.scores(prompts, made, found)
        watch.lap("judge_s")
        figures = self.figures(prompts, made, found, scores)
        self._require_same_policy(figures["gap"])
        rows, more = self.rows(params, made, found, scores, start // self.config.rollout.episodes)
        return rows, figures | more | watch.seconds

    def rows(
        self, params: Any, made: Rollout, found: Judged, scores: np.ndarray, iteration: int
    ) -> tuple[Any, dict[str, float]]:
        """What is learned from, and what else is to be logged."""
        raise NotImplementedError

    def figures(self, prompts: Sequence[Prompt], made: Rollout, found: Judged, scores: np.ndarray) -> dict[str, float]:
        """score: mean; kl: nats per reply between policy and reference; length: tokens; ended: share with an end token;
        gap: mean nats between a token's log-probability when it was drawn and when it was judged; gold: mean of what
        that function gives, where there is one."""
        mask = made.drawn.targets != PADDING
        gold = ask(self._gold, _said(prompts, made), f"gold {self.config.gold}") if self._gold else []
        return ({"gold": float(np.mean(gold))} if gold else {}) | {
            "score": float(scores.mean()),
            "kl": float(((found.logprobs - found.ref_logprobs) * mask).sum() / len(scores)),
            "length": float(mask.sum() / len(scores)),
            "ended": float(made.ended.mean()),
            "gap": float(np.abs((found.plain - made.logprobs) * mask).sum() / max(mask.sum(), 1)),
        }

    def _require_same_policy(self, gap: float) -> None:
        if not gap <= self.config.rollout.max_gap:  # also where it is not a number
            raise UserError(
                f"rollout.max_gap = {self.config.rollout.max_gap}: log-probabilities when tokens were drawn and when "
                f"they were judged differ by {gap:.3g} nats in the mean; what learns is not what speaks"
            )

    def feed(self, positions: Sequence[int] | None, rows: Sequence[int]) -> Rollouts:  # type: ignore[override]
        c, (done, *rest) = self.config, positions or (0,)
        return Rollouts(
            self,
            seed=c.train.seed,
            episodes=c.rollout.episodes,
            epochs=c.rollout.epochs,
            size=c.train.batch_size,
            micro=c.micro_batch_size,
            done=done,
            rows=rows,
            text=self.text(rest or None, rows),
        )

    def text(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream | None:
        """What goes beside the replies in `rows` of a micro-batch, from a position on."""
        return None

    def counts(self, rows: Any) -> Any:
        """The number of drawn tokens."""
        return jnp.sum(rows.targets != PADDING, dtype=jnp.float32)

    def summary(self, figures: dict[str, Array]) -> dict[str, Array]:
        """Means over the updates, and of the first one how far it is from the policy that was judged: the largest
        |ratio - 1|."""
        return jax.tree.map(jnp.mean, figures) | {"ratio_error": figures["ratio_error"][0]}

    def loss(self, params: Any, rows: Any, counts: Any, key: Array | None) -> Array:
        return self.loss_and_figures(params, rows, counts, key)[0]

    # Evaluation

    def evaluate(self, params: Any, place: Callable[[Any], Any], rows: Sequence[int]) -> dict[str, Any]:
        """Figures of replies to the evaluation prompts, or train.eval_batches micro-batches of them, always with the
        same random numbers. The loss is minus the mean score."""
        limit, size = self.config.train.eval_batches, self.config.micro_batch_size
        count = len(self.evaluation) if limit < 0 else min(limit * size, len(self.evaluation))
        epoch = self.evaluation.epoch(0, 0)
        prompts = [self.evaluation[epoch.row(i)[0]] for i in range(count)]
        made = self.replies(params, prompts, EVALUATION_SEED, 0)
        found = self.judge(params, made.drawn)
        scores = self.scores(prompts, made, found)
        return {"loss": -float(scores.mean())} | self.figures(prompts, made, found, scores)


EVALUATION_SEED = 2**64 - 1  # which no run draws its replies by, unless it is asked to


def _said(prompts: Sequence[Prompt], made: Rollout) -> list[tuple[str, str, str]]:
    return [(prompt.text, text, prompt.answer) for prompt, text in zip(prompts, made.texts, strict=True)]


def _filled(leaf: np.ndarray, size: int) -> np.ndarray:
    """With its last row again where it has too few."""
    return leaf[np.minimum(np.arange(size), len(leaf) - 1)]
