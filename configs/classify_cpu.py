"""Fine-tuning of an encoder to tell classes of texts, from the run of bert_cpu: 2 CPU cores, minutes.

    python -m gptjax.recipe.swapped PATH/wikitext2-valid.txt sentences.jsonl
    gptjax train configs/classify_cpu.py --data.source sentences.jsonl
    gptjax tell runs/classify_cpu --text 'He was born in the city of London .'
Whether two words of a sentence have changed places; labels.names are the values of the field `label`.
Compiled for cpu-1: 0.105 GB a device.
"""

from dataclasses import replace

from gptjax.config import ClassifyConfig, LabelledConfig, LabelsConfig, OptimizerConfig, TrainConfig
from gptjax.stages.weights import about


def config(init_from: str = "runs/bert_cpu") -> ClassifyConfig:
    return ClassifyConfig(
        name="classify_cpu",
        model=replace(about(init_from)[0].model, dropout=0.1),
        init_from=init_from,
        data=LabelledConfig(source="sentences.jsonl"),
        labels=LabelsConfig(names=("0", "1")),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, decay="linear", final_ratio=0.0, warmup_tokens=50_000, decay_tokens=0, weight_decay=0.01
        ),
        train=TrainConfig(batch_size=32, epochs=4, log_interval=50, eval_interval=200, eval_batches=-1, keep_best=True),
    )
