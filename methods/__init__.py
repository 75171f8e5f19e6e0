"""The table of methods: a row's name and the class that makes its student.

Importing this imports no method. A new method is one file in this folder and one line here
(docs/add-a-method.md). Every file of this folder holds a method of the table, except `base.py` and
`masks.py`, which methods use, and `packed.py`, which opens students in other programs. Code that
methods share is in `training/` and `compression/`.
"""

import harness.renames  # noqa: F401  the package finds modules by their old names, ours too

METHODS: dict[str, str] = {
    "identity": "methods.identity:Identity",
    "untouched": "methods.untouched:Untouched",
    "sft": "methods.sft:SupervisedFineTuning",
    "answer-only": "methods.answer_only:AnswerOnly",
    # another name of sft: it trains on the gold rationales
    "cot-human": "methods.sft:SupervisedFineTuning",
    "response": "methods.response:ResponseDistillation",
    "feature": "methods.feature:FeatureDistillation",
    "attention": "methods.attention:AttentionDistillation",
    "cot": "methods.cot:ChainOfThought",
    "cot-unfiltered": "methods.cot:UnfilteredChainOfThought",
    "selective": "methods.selective:SelectiveDistillation",
    "selective-random": "methods.selective:RandomSelection",
    "multi-teacher": "methods.multi_teacher:MultiTeacher",
    "best-single-teacher": "methods.multi_teacher:BestSingleTeacher",
    "on-policy": "methods.on_policy:OnPolicyDistillation",
    "uld": "methods.uld:UniversalLogitDistillation",
    "int8": "methods.int8:Int8",
    "int8-dynamic": "methods.int8:Int8Dynamic",
    "int4": "methods.int4:Int4",
    "int4-calibrated": "methods.int4:Int4Calibrated",
    "awq": "methods.awq:Awq",
    "fake-int4": "methods.int4:FakeInt4",
    "fp8": "methods.fp8:Fp8",
    "nvfp4": "methods.fp8:Nvfp4",
    "mxfp4": "methods.fp8:Mxfp4",
    "nf4": "methods.nf4:Nf4",
    "bnb-int8": "methods.nf4:BitsAndBytesInt8",
    "torchao": "methods.torchao:TorchAo",
    "quanto": "methods.quanto:Quanto",
    "autoround": "methods.autoround:AutoRound",
    "gptq": "methods.gptq:Gptq",
    "prune-magnitude": "methods.prune_magnitude:MagnitudePruning",
    "prune-random": "methods.prune_magnitude:RandomPruning",
    "prune-wanda": "methods.prune_wanda:WandaPruning",
    "prune-sparsegpt": "methods.prune_sparsegpt:SparseGptPruning",
    "prune-depth": "methods.prune_depth:DepthPruning",
    "prune-depth-random": "methods.prune_depth:RandomDepthPruning",
    "prune-width": "methods.prune_width:WidthPruning",
    "prune-width-random": "methods.prune_width:RandomWidthPruning",
    "kv-int8": "methods.kv:KvInt8",
    "kv-int4": "methods.kv:KvInt4",
    "lowrank": "methods.lowrank:LowRank",
    "lowrank-plain": "methods.lowrank:PlainLowRank",
}
