"""Old names and new ones, in one table: what was typed, written and programmed goes on to work.

This page is the table; `docs/compatibility.md` shows it. `settings` reads settings of methods,
`labels` rows of older records, `options` flags, keys of run files and arguments of `harness.run`,
`modules` what programs import, `arguments` what they call it with, `columns` headers that are
typed, and `notice` warns of each old name once. To rename something, add it here and rename it
there: nothing else knows the old name.
"""

__all__ = ["arguments", "columns", "labels", "modules", "notice", "options", "settings"]

# The version and the date until which a name goes on to work; the later of the two counts.
FROM_0_1 = ("0.3.0", "2027-12-01")

TRAINED = (
    "sft",
    "answer-only",
    "cot-human",
    "response",
    "feature",
    "attention",
    "cot",
    "cot-unfiltered",
    "selective",
    "selective-random",
    "multi-teacher",
    "best-single-teacher",
    "on-policy",
    "uld",
)
GROUPED = (
    "int4",
    "int4-calibrated",
    "awq",
    "autoround",
    "fake-int4",
    "torchao",
    "gptq",
    "kv-int8",
    "kv-int4",
)
ROUNDED = ("int4", "int4-calibrated", "awq", "autoround", "fake-int4")
COMPENSATED = ("int4-calibrated", "prune-sparsegpt")
CHOSEN_LAYERS = (
    "int8",
    "int8-dynamic",
    "int4",
    "int4-calibrated",
    "awq",
    "autoround",
    "fake-int4",
    "fp8",
    "nvfp4",
    "mxfp4",
    "prune-magnitude",
    "prune-random",
    "prune-wanda",
    "prune-sparsegpt",
    "lowrank",
    "lowrank-plain",
)
CALIBRATED = (
    "int4-calibrated",
    "awq",
    "autoround",
    "gptq",
    "prune-wanda",
    "prune-sparsegpt",
    "prune-depth",
    "prune-width",
    "lowrank",
    "lowrank-plain",
)

# Settings of methods: old name -> new name, how the value is read, until when, which of our methods
# have it. One of another package reads the old name where it has the new setting and none of the
# old.
SETTINGS = {
    "group": ("group_size", "same", FROM_0_1, GROUPED),
    "zeros": (
        "symmetric",
        "opposite",
        FROM_0_1,
        ROUNDED,
    ),  # zeros=true had a zero point for every group
    "damp": ("dampening_frac", "same", FROM_0_1, COMPENSATED),
    "skip": ("ignore", "same", FROM_0_1, CHOSEN_LAYERS),
    "sequences": ("num_calibration_samples", "same", FROM_0_1, CALIBRATED),
    "tokens": ("max_seq_length", "same", FROM_0_1, CALIBRATED),
    "batch_rows": ("batch_size", "same", FROM_0_1, (*TRAINED, "autoround")),
    "micro_rows": ("micro_batch_size", "same", FROM_0_1, TRAINED),
    "checkpointing": ("gradient_checkpointing", "same", FROM_0_1, TRAINED),
    "warmup": ("warmup_ratio", "same", FROM_0_1, TRAINED),
    "clip": ("max_grad_norm", "same", FROM_0_1, TRAINED),
}

# Traits that a method declares (harness.contract.Method): old name -> new name, until when.
TRAITS = {
    "draws": ("draws_random_numbers", FROM_0_1),
    "several_teachers": ("needs_several_teachers", FROM_0_1),
    "same_vocabulary": ("needs_same_vocabulary", FROM_0_1),
    "reads_inside": ("reads_teacher_live", FROM_0_1),
    "hands_on": ("control_settings", FROM_0_1),
    "shaped": ("resulting_shape", FROM_0_1),
}

# Options of `harness run`, with underscores as in run files and in Python: old -> new, until when.
OPTIONS: dict[str, tuple[str, tuple[str, str]]] = {}

# Modules that programs import, and names in them ("module:name"): old -> new, until when. A module
# that was split is found in each of its parts, in this order.
MODULES: dict[str, tuple[str, tuple[str, str]]] = {
    "methods.base:changed": ("methods.base:non_default_settings", FROM_0_1),
    "methods.compression.base:Making": ("methods.compression.base:StudentBuilder", FROM_0_1),
    "methods.compression.external:require": (
        "methods.compression.external:require_package",
        FROM_0_1,
    ),
    "methods.compression.external:by_library": (
        "methods.compression.external:explaining_library_errors",
        FROM_0_1,
    ),
    "methods.compression.external:written_by": (
        "methods.compression.external:save_library_student",
        FROM_0_1,
    ),
    "suites:OUTSIDE": ("suites:LM_EVAL_PREFIX", FROM_0_1),
    "suites.loading.lm_eval:configurable_task": (
        "suites.loading.lm_eval:build_task_over_rows",
        FROM_0_1,
    ),
    "suites.loading.lm_eval:built": ("suites.loading.lm_eval:build_task", FROM_0_1),
    "suites.loading.lm_eval:builtin": ("suites.loading.lm_eval:read_builtin", FROM_0_1),
    "methods._settings": ("methods.base", FROM_0_1),
    "methods._base": ("methods.training.base, methods.training.sources", FROM_0_1),
    "methods._terms": (
        "methods.training.terms, methods.training.positions, methods.training.selection, "
        "methods.training.divergences, methods.training.teachers",
        FROM_0_1,
    ),
    "methods._distil": ("methods.training.distilled", FROM_0_1),
    "methods.training.base:rate_for": ("methods.training.base:default_learning_rate", FROM_0_1),
    "methods.training.base:worked": ("methods.training.base:full_solution_pairs", FROM_0_1),
    "methods.training.base:bare": ("methods.training.base:answer_only_pairs", FROM_0_1),
    "methods.training.sources:context_of": ("methods.training.sources:common_context", FROM_0_1),
    "methods.training.teachers:Source": ("methods.training.teachers:TeacherSource", FROM_0_1),
    "methods.training.teachers:Head": (
        "methods.training.teachers:TrainedPositionLogits",
        FROM_0_1,
    ),
    "methods.training.teachers:Live": ("methods.training.teachers:LiveTeacher", FROM_0_1),
    "methods.training.teachers:OtherTokens": (
        "methods.training.teachers:CrossTokenizerTeacher",
        FROM_0_1,
    ),
    "harness.files.writing:write_whole": ("harness.files.writing:write_atomically", FROM_0_1),
    "harness.files.writing:keep_file": ("harness.files.writing:replace_file", FROM_0_1),
    "harness.files.writing:sync": ("harness.files.writing:sync_to_disk", FROM_0_1),
    "harness.files.writing:finite": ("harness.files.writing:nonfinite_as_null", FROM_0_1),
    "harness.checkpoint": (
        "harness.models.checkpoint, harness.files.writing, harness.files.digests",
        FROM_0_1,
    ),
    "harness.model": (
        "harness.models.language_model, harness.models.shaping, harness.models.resolve",
        FROM_0_1,
    ),
    "harness.testing:Checked": ("harness.testing:ContractReport", FROM_0_1),
    "harness.api:Weighed": ("harness.api:MeasuredModel", FROM_0_1),
    "harness.api:expect": ("harness.api:estimate_cells", FROM_0_1),
    "harness.api:Finished": ("harness.running.runner:CellResult", FROM_0_1),
    "harness.api:Watcher": ("harness.running.runner:callbacks_by_old_names", FROM_0_1),
    "harness.running.runner:Finished": ("harness.running.runner:CellResult", FROM_0_1),
    "harness.running.runner:Watcher": (
        "harness.running.runner:callbacks_by_old_names",
        FROM_0_1,
    ),
    "harness.registry:built": ("harness.registry:construct", FROM_0_1),
    "harness.registry:admitted": ("harness.registry:admit_method", FROM_0_1),
    "harness.registry:expanded": ("harness.registry:settings_with_defaults", FROM_0_1),
    "harness.data:DataSource": ("harness.data:LocalOrHubData", FROM_0_1),
    "harness.data:contaminated": ("harness.data:contaminated_texts", FROM_0_1),
    "harness.data:overlapping": ("harness.data:overlapping_prompts", FROM_0_1),
    "harness.data.source:DataSource": ("harness.data.source:LocalOrHubData", FROM_0_1),
    "harness.scoring.backend:Scored": ("harness.scoring.backend:LikelihoodRequest", FROM_0_1),
}

# Arguments in Python: "module:name.argument" -> new name, until when. The function or class is
# decorated with `accept_old_arguments`.
ARGUMENTS = {
    "methods.training.base:TrainOptions.inwards": ("taps", FROM_0_1),
    "methods.training.terms:Objective.inwards": ("taps", FROM_0_1),
    "methods.training.sources:Teachers.whole": ("needs_all_probabilities", FROM_0_1),
    "methods.training.sources:Teachers.inside": ("needs_inner_states", FROM_0_1),
    "methods.training.sources:Teachers.own_tokens": ("own_tokenizer", FROM_0_1),
}

# Headers of columns in tables, CSV files and frames: old header -> new header, until when.
COLUMNS = {
    "lost/won": ("losses/wins", FROM_0_1),
    "lost": ("losses", FROM_0_1),
    "won": ("wins", FROM_0_1),
    "same top": ("top-1 agreement", FROM_0_1),
    "unended": ("truncated", FROM_0_1),
    "seen": ("tokens seen", FROM_0_1),
    "trained": ("tokens trained", FROM_0_1),
    "its share s": ("shared s/row", FROM_0_1),
}
