"""A folder of task files as a person writes one, with data beside them and a function of their own."""

import json
from pathlib import Path

FILES = {
    "word.yaml": """
task: mine_word
include: data_yaml
output_type: loglikelihood
doc_to_target: word
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "choice.yaml": """
task: mine_choice
include: data_yaml
tag: mine_tag
output_type: multiple_choice
doc_to_choice: !function own.choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "group.yaml": """
group: mine
task: [mine_word, mine_choice]
aggregate_metric_list: [{metric: acc}]
""",
    "data_yaml": """
dataset_path: json
dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}
training_split: train
test_split: test
doc_to_text: "{{name}} ="
""",
    "own.py": "def choices(doc):\n    return [doc['word'], 'x', 'def']\n",
}
WORDS = ("one", "two", "import", "class", "self", "return", "none", "zip")


def write_tasks(folder: Path, **others: str) -> Path:
    """Write the files into a new folder, `others` in their place or beside them."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"name": f"{split[:2]}{i}", "word": word} for i, word in enumerate(WORDS)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (FILES | {name.replace("_yaml", ".yaml"): text for name, text in others.items()}).items():
        (folder / name).write_text(text)
    return folder
