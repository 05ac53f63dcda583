"""Fine-tuning of an encoder to tell classes of texts, from the run of bert_cpu: 2 CPU cores, minutes.

    python -m gptjax.recipe.topics PATH/wikitext2-valid.txt sentences.jsonl
    gptjax train configs/classify_cpu.py --data.source sentences.jsonl
    gptjax tell runs/classify_cpu --text 'The highway crosses the county line .'
Of which article a sentence is; labels.names are the values of the field `label`.
Compiled for cpu-1: 0.105 GB a device.
"""

from dataclasses import replace

from gptjax.config import ClassifyConfig, LabelledConfig, LabelsConfig, OptimizerConfig, TrainConfig
from gptjax.stages.weights import about

ARTICLES = (
    "1888-89-new-zealand-native-football-team",
    "battle-of-s-ridge",
    "first-invasion-of-burma",
    "meridian-mississippi",
    "military-history-of-australia",
    "scientology-in-germany",
    "u-s-route-2-in-michigan",
    "ward-churchill",
)


def config(init_from: str = "runs/bert_cpu") -> ClassifyConfig:
    return ClassifyConfig(
        name="classify_cpu",
        model=replace(about(init_from)[0].model, dropout=0.1),
        init_from=init_from,
        data=LabelledConfig(source="sentences.jsonl", train_split="train[:80%]", eval_split="train[80%:]"),
        labels=LabelsConfig(names=ARTICLES),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, decay="linear", final_ratio=0.0, warmup_tokens=50_000, decay_tokens=0, weight_decay=0.01
        ),
        train=TrainConfig(batch_size=32, epochs=6, log_interval=50, eval_interval=100, eval_batches=-1, keep_best=True),
    )
