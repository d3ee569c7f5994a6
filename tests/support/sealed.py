"""Make whole campaigns for an auditor in seconds, without training: a complete sealed log, and the files that it names.

The real code makes plans, decisions and overrides. Outcomes are simulated (logs.py), and completions and HDF5 files have a few bytes.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.campaign import canonical, constitution, heads
from pipeline.campaign.files import tree_digest
from pipeline.campaign.keys import commitment, make_key, sign
from pipeline.campaign.records import Arm, Decision, Outcome, Plan
from pipeline.config import settings
from pipeline.decision import derive, history, proposal_gate
from pipeline.decision.plan import make_arms, reference_arms
from pipeline.rounds.init import freeze_code
from pipeline.stats import critical_values
from pipeline.stats.design import Design
from tests.support import logs
from tests.support.logs import RULES, LogCampaign, Truth

CHOSEN = settings.compose(["experiment=nano_30b", "policy/axes=tiny"])
GPUS = ("cluster.gpus_per_node=64", "cluster.time_limit_minutes=60")  # so that an arm has a price
MODEL = "0" * 64  # stands for what is not looked at


def digest(*words: object) -> str:
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()


def gains(name: str, arm: Arm) -> Truth:
    """One axis is good, one arm fails: a decision that keeps something, and an outcome without a score."""
    if name == "r0002" and arm.index == 3:
        return Truth(missing="diverged")
    gain = 0.2 if arm.axis == "lora_rank" and name == "r0001" else 0.0
    return Truth(dict.fromkeys(logs.LEVELS, gain))


def cost_of(chosen: settings.Settings) -> dict[str, int]:
    """Of an arm, as the basis of a plan has it."""
    recipe = chosen.recipe
    return {
        "tokens_per_arm": recipe.num_steps * recipe.batch_size * recipe.sequence_length,
        "gpus_per_arm": chosen.parallelism.world_size if chosen.cluster.gpus_per_node else 0,
        "time_limit_minutes": chosen.cluster.time_limit_minutes,
    }


@dataclass
class SealedCampaign(LogCampaign):
    """As a campaign's folder holds it after so many rounds: `lines` of the log, `files` by path."""

    num_items: int = 40
    campaign: str = "sealed-0001"
    key: Path = Path()
    lines: list[bytes] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    config: bytes = b""
    cost: dict[str, int] = field(default_factory=dict)
    rules: constitution.Constitution = RULES
    text: bytes = b""  # of the constitution, where it is another than ours
    external: str = "local"
    has_code: bool = False  # it carries the code that `init` freezes, and not the constitution alone

    def __post_init__(self) -> None:
        num_rounds = self.rules.num_rounds
        target = (1000, 2) if self.external != "none" else (0, 0)
        self.design = Design(num_rounds, 8, len(self.levels), self.num_items, self.num_items, *target)
        keys = [axis.key for axis in self.policy.axes] + [f"recipe.mix.{family}" for family in CHOSEN.tasks.families]
        self.reference = {key: settings.value_of(CHOSEN, key) for key in keys}
        self.public_key = make_key(self.key)
        rounds = [f"r{number:04d}" for number in range(1, num_rounds + 1)]
        names = ["dev", "board", *(f"fresh/{name}" for name in rounds), *(f"dev/{name}" for name in rounds[1:])]
        self.seeds = {name: digest(self.campaign, name) for name in names}
        self.found()

    def found(self) -> None:
        """init, and the plan of r0000."""
        with TemporaryDirectory() as folder:
            code = Path(folder, "code")
            (code / "constitution").mkdir(parents=True)
            for name in ("constitution.yaml", "articles.json"):
                (code / "constitution" / name).write_bytes(self.text or (constitution.HERE / name).read_bytes())
            if self.has_code:
                code = Path(folder, "frozen", freeze_code(Path(folder, "frozen"))[:16])
            self.code_digest = tree_digest(code)
            for path in filter(Path.is_file, code.rglob("*")):
                self.files[f"code/{self.code_digest[:16]}/{path.relative_to(code)}"] = path.read_bytes()
        self.files["image/substrate.sqsh"] = b"squashed"
        try:
            critical = critical_values.read_critical_values(self.design)["critical"]
        except Exception:
            critical = critical_values.bounds(self.design)
        facts = {
            "schema": 1, "campaign": self.campaign, "image": {"tree_digest": MODEL, "sqsh_sha256": canonical.sha256(b"squashed")},
            "runtime_digest": MODEL, "constitution_digest": self.rules.digest, "code_digest": self.code_digest, "revision": "unknown",
            "overrides": [], "settled": {}, "commitments": {name: commitment(name, seed) for name, seed in self.seeds.items()},
            "articles": self.rules.articles, "design": self.design.to_json(), "critical": critical,
            "critical_source": "", "choice": "value", "confirmation": "running", "families": sorted(self.levels), "external": self.external,
            "public_key": self.public_key,
        }  # fmt: skip
        self.files["campaign.yaml"] = json.dumps(facts).encode()
        self.add("init", facts=facts, campaign_yaml=canonical.sha256(self.files["campaign.yaml"]))
        for name in ("r0000", "r0001"):
            self.files[f"hydra/round/{name}.yaml"] = canonical.overrides_text({"round": name}).encode()
        self.plan("r0000", reference_arms(1))

    def add(self, event: str, **payload: Any) -> None:
        previous = canonical.sha256(self.lines[-1]) if self.lines else heads.GENESIS
        line = canonical.encoded({"seq": len(self.lines), "previous": previous, "event": event, **payload})
        self.lines.append(line)
        self.records.append(json.loads(line))

    def plan(self, name: str, arms: tuple[Arm, ...]) -> None:
        """Basis and plan, and the files of both."""
        items = [f"tasks.num_{each}_per_family={self.num_items}" for each in ("dev", "fresh")]
        if not self.config:
            chosen = settings.compose(
                [
                    "experiment=nano_30b",
                    "policy=optuna",
                    "policy/axes=tiny",
                    f"external={self.external}",
                    "seed=1",
                    *GPUS,
                    *items,
                ]
            )
            self.config, self.cost = settings.to_yaml(chosen).encode(), cost_of(chosen)
        config = self.config
        config_digest = canonical.sha256(config)
        tasks = {
            "families": sorted(self.levels), "level": "full", "num_dev_per_family": self.num_items,
            "num_fresh_per_family": self.num_items, "dev_slices": {},
        }  # fmt: skip
        self.add(
            "basis", round=name, config_digest=config_digest, seed=1, reference=self.reference, tasks=tasks, external=self.external,
            proposals={"kind": "optuna", "mode": "shadow"}, **self.cost,
            spent_gpu_seconds=sum(r["gpu_seconds"] for r in self.records if r["event"] == "attempt" and r["arm"] != "reference"),
        )  # fmt: skip
        digests = (MODEL, self.rules.digest, self.code_digest, config_digest)
        frozen = Plan(self.campaign, name, *digests, self.policy, arms)
        self.add("plan", round=name, plan_digest=canonical.digest(frozen.to_json()), plan=frozen.to_json())
        self.files[f"rounds/{name}/config.yaml"] = config
        self.files[f"rounds/{name}/plan.json"] = canonical.encoded(frozen.to_json())

    def play(self) -> derive.Derived:
        number = len(self.derived) + 1
        name = f"r{number:04d}"
        arms = make_arms(self.policy, number, 1, 1 if number == 1 else 0, self.reference)
        self.propose(name)
        self.plan(name, arms)
        planned = self.records[-1]["plan_digest"]
        self.add("slurm_submission", round=name, plan_digest=planned, kind="slurm")
        if number == 1:
            for arm in reference_arms(1):
                self.attempt("r0000", arm)
        outcomes = [self.filed(name, arm) for arm in arms]
        reference = Arm(0, "reference", 0)
        self.attempt(name, reference)
        outcomes.append(self.filed_reference(name, reference))
        for outcome in outcomes:
            self.add("outcome", round=name, arm=outcome.arm, outcome=asdict(outcome))
        self.submit(name, arms)
        return self.decide(name)

    def decide(self, name: str, number: int = 0) -> derive.Derived:
        """Evidence, decision, overrides, reveal, close."""
        derived = derive.derive(self.records, name)
        evidence = canonical.encoded(derived.evidence.to_json())
        self.files["ledger.h5"] = digest("ledger", name).encode()
        self.add(
            "evidence", round=name, sha256=canonical.sha256(evidence), ledger=canonical.sha256(self.files["ledger.h5"])
        )
        self.files[f"rounds/{name}/evidence.json"] = evidence
        decision = self.decision(derived)
        self.add("decision", round=name, number=number, decision=asdict(decision))
        content = {**self.records[-1]["decision"], "evidence_digest": canonical.sha256(evidence)}
        self.files[f"rounds/{name}/decisions/{number:02d}.json"] = canonical.encoded(content)
        overrides = derive.next_overrides(decision, self.rules, self.design.rounds)
        if overrides is not None:
            self.add("overrides", round=overrides["round"], overrides=overrides)
            self.files[f"hydra/round/{overrides['round']}.yaml"] = canonical.overrides_text(overrides).encode()
        self.derived[name], self.policy = derived, decision.policy
        self.add("reveal", round=name, name=f"fresh/{name}", seed=self.seeds[f"fresh/{name}"])
        self.close(name)
        return derived

    def decision(self, derived: derive.Derived) -> Decision:
        """What the log says was decided; a rigged campaign says something else."""
        return derived.decision

    def close(self, name: str) -> None:
        number = sum(r["event"] == "close" and r["round"] == name for r in self.records)
        head = heads.head_over(self.lines, self.records, self.campaign, name, number)
        self.add("close", **asdict(head), signature=sign(self.key, head.message))
        anchor = str(heads.newest_anchor(self.lines, self.campaign))
        content = {"fresh_seed": self.seeds[f"fresh/{name}"], **self.records[-1], "anchor": anchor}
        self.files[f"rounds/{name}/closed.json"] = canonical.encoded(content)

    def filed(self, name: str, arm: Arm) -> Outcome:
        """An arm's outcome with the files that its attempt left."""
        outcome = self.outcome(name, arm, self.world(name, arm))
        result, adapter = self.attempt(name, arm, outcome.status, outcome.exit_class)
        return Outcome(**{**asdict(outcome), "result_digest": result, "adapter_digest": adapter})

    def filed_reference(self, name: str, arm: Arm) -> Outcome:
        outcome = self.outcome(name, arm, Truth())
        first = next(r for r in self.records if r["event"] == "attempt" and (r["round"], r["arm"]) == ("r0000", "a0"))
        result = first["files"]["rounds/r0000/a0/attempt_00/result.h5"]
        return Outcome(**{**asdict(outcome), "result_digest": result, "adapter_digest": first["adapter_digest"]})

    def attempt(self, name: str, arm: Arm, status: str = "completed", exit_class: str = "completed") -> tuple[str, str]:
        """The record of an attempt and its files; digests of result file and adapter."""
        is_reference = arm.role == "reference" and name != "r0000"
        label = "reference" if is_reference else arm.name
        folder = f"rounds/{name}" if is_reference else f"rounds/{name}/{label}/attempt_00"
        result = f"{folder}/reference.h5" if is_reference else f"{folder}/result.h5"
        completions = f"{folder}/meta/completions" if is_reference else f"{folder}/completions"
        planned = next(r for r in self.records if r["event"] == "plan" and r["round"] == name)
        weights = b"" if arm.role == "base" or status != "completed" else digest(name, label, "weights").encode()
        adapter = canonical.sha256(weights) if weights else ""
        if is_reference:
            adapter = canonical.sha256(digest("r0000", "a0", "weights").encode())
        names = [result, *(f"{completions}/{each}.jsonl" for each in ("dev", "fresh"))]
        if not is_reference:
            names += [f"{folder}/{each}.json" for each in ("claim", "sealed", "data_card", "probe")]
            self.files[f"rounds/{name}/{label}.h5"] = digest(result).encode()
            if weights:
                self.files[f"{folder}/adapter/adapter_model.safetensors"] = weights
                self.files[f"{folder}/adapter/adapter_config.json"] = b""
        for path in names:
            is_seal = path.endswith("/sealed.json")
            self.files[path] = canonical.encoded({"edited_files": 0}) if is_seal else digest(path).encode()
        frozen = planned["plan"]
        digests = ("image_digest", "constitution_digest", "config_digest")
        self.add(
            "attempt", round=name, arm=label, attempt=0, status=status, exit_class=exit_class, role=arm.role, seed=arm.seed,
            gpu_seconds=100, train_gpu_seconds=40, train_steps=30, adapter_digest=adapter, plan_digest="" if is_reference else planned["plan_digest"],
            files={path: canonical.sha256(self.files[path]) for path in names}, runtime_digest=MODEL,
            **{each: frozen[each] for each in digests},
        )  # fmt: skip
        return canonical.sha256(self.files[result]), adapter

    def propose(self, name: str) -> None:
        """One accepted proposal and a refused one, in shadow."""
        request = canonical.encoded({"open_keys": {key: {"reference": value} for key, value in self.reference.items()}})
        offers = [
            {"axis": "learning_rate", "key": "recipe.learning_rate", "value": value, "hypothesis": "none"}
            for value in ("0.00037", "7")
        ]
        answer = json.dumps({"proposals": offers}).encode()
        verdicts = proposal_gate.judge_answer(answer, self.policy, self.reference, self.rules)
        path = f"rounds/{name}/proposals/00"
        self.files[f"{path}.request.json"], self.files[f"{path}.response.json"] = request, answer
        self.add(
            "proposal", round=name, number=0, policy="optuna", mode="shadow", request_digest=canonical.sha256(request),
            response_digest=canonical.sha256(answer), verdicts=[verdict.to_json() for verdict in verdicts],
        )  # fmt: skip
        for verdict in verdicts:
            if not verdict.accepted:
                names = ("slot", "article", "code", "what")
                self.add("refusal", round=name, number=0, **{each: getattr(verdict, each) for each in names})

    def submit(self, name: str, arms: tuple[Arm, ...]) -> None:
        """Chosen before anything is known of the round, then the reference, once, and the arms."""
        self.add(
            "submissions_chosen",
            round=name,
            arms=list(derive.choose_submissions(history.read_history(self.records), name)),
        )
        chosen = self.records[-1]["arms"]
        for arm in (["reference"] * 2 if name == "r0001" and self.external != "none" else []) + chosen:
            self.score(name, arm, 0.7 + len(self.lines) % 9 / 100)

    def score(self, name: str, arm: str, value: float) -> None:
        number = sum(record["event"] == "submission" for record in self.records) + 1
        adapters = {(r["round"], r["arm"]): r["adapter_digest"] for r in self.records if r["event"] == "attempt"}
        day = (date(2026, 11, 1) + timedelta(days=int(name[1:]))).isoformat()
        self.add(
            "submission", number=number, round=name, arm=arm, purpose="reference" if arm == "reference" else "slot",
            adapter_digest=adapters[name, arm], target=self.external, day=day,
        )  # fmt: skip
        self.add("board_attempt", number=number, day=day)
        self.add("board_sent", number=number)
        self.add("board_score", number=number, score=f"{value:.2f}")

    def write(self, folder: Path) -> Path:
        """Everything into a folder."""
        self.files["log.jsonl"] = b"".join(line + b"\n" for line in self.lines)
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


_KEEP: list[TemporaryDirectory[str]] = []


@cache
def played(
    rounds: int = 4, num_items: int = 40, num_families: int = 3, campaign: str = "sealed-0001"
) -> SealedCampaign:
    """Made once a session; nobody changes it."""
    _KEEP.append(TemporaryDirectory(prefix="sealed-"))
    levels = dict(list(logs.LEVELS.items())[:num_families])
    found = SealedCampaign(
        gains, levels=levels, num_items=num_items, campaign=campaign, key=Path(_KEEP[-1].name, "key")
    )
    for _ in range(rounds):
        found.play()
    return found


def rechained(records: Iterable[dict[str, Any]], key: Path | None = None) -> list[bytes]:
    """Lines with chain and heads made consistent again; heads are signed anew where the key is at hand, else keep their signatures."""
    lines: list[bytes] = []
    made: list[dict[str, Any]] = []
    for record in records:
        previous = canonical.sha256(lines[-1]) if lines else heads.GENESIS
        record = {**record, "seq": len(lines), "previous": previous}
        if record["event"] == "close":
            head = heads.head_over(lines, made, record["campaign"], record["round"], record["number"])
            signature = sign(key, head.message) if key else record["signature"]
            record = {**record, **asdict(head), "signature": signature}
        made.append(record)
        lines.append(canonical.encoded(record))
    return lines
