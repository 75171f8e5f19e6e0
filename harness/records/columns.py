"""Every quantity that is measured, printed, sorted, plotted, explained or exported. No torch.

A column's header, unit, scale, format, direction and meaning stand here and nowhere else: tables,
page, pictures, glossary, frame and the gate's output read them. A column is renamed here alone.
The file is longer than others because it is one table, an entry for each quantity; their type is in
`quantity`.
"""

from dataclasses import replace

from harness.records.quantity import (
    DASH,
    GIB,
    HIGH_END,
    LOW_END,
    MIB,
    Header,
    Quantity,
    mebibytes_format,
    ratio_format,
)

# and each quantity, by its own name
__all__ = ["DASH", "FRAME", "GIB", "MIB", "QUANTITIES", "Header", "Quantity", "quantity_of"]

# What a row is.
ROW = Quantity(
    "row",
    "row",
    words=True,
    help="the method that made the student; settings that differ from the defaults in brackets",
)
FAMILY = Quantity(
    "family",
    "family",
    words=True,
    help="the kind of method; rows of one family stand together, controls last",
)
SEEDS = Quantity(
    "seeds", "seeds", help="independent training runs, pooled; 1 for rows without a random draw"
)
CONTROL = Quantity("control", "control", words=True, term="", help="whether the row is a control")
STATUS = Quantity(
    "status",
    "status",
    words=True,
    term="",
    help="success, or the first thing that is wrong with the row's records",
)
TASK = Quantity("task", "task", words=True, term="", help="the task that the line is of")
BEST = Quantity(
    "best",
    "best",
    words=True,
    term="",
    help="whether the row is the best one on the task, or not significantly worse than it",
)

# What students can do.
SCORE = Quantity(
    "score",
    "score",
    leads=True,
    better="higher",
    help="accuracy, or the task's own metric, by its primary extractor, mean over seeds; bold: the "
    "best row and all not significantly "
    "worse",
)
ERROR = Quantity(
    "error",
    "error",
    leads=True,
    better="lower",
    help="the same of a metric that is better when lower",
)
RETENTION = Quantity(
    "retention",
    "retention",
    unit="%",
    share=True,
    format=".1f",
    leads=True,
    better="higher",
    help="student's score / teacher's score on the same items, with its 95 % interval (one "
    "training: paired score interval over items, "
    "of this checkpoint; several: Student's t over trainings and items, of the method; items that "
    "carry numbers: paired means)",
)
DIFFERENCE = Quantity(
    "difference",
    "difference",
    unit="points",
    share=True,
    format="+.1f",
    better="higher",
    help="student's figure - teacher's, of a figure that all items make together (F1, BLEU), with "
    "its 95 % interval: items drawn again,"
    " the same ones for both",
)
DIFFERENCE_OF_NUMBERS = replace(
    DIFFERENCE, key="difference_of_numbers", unit="", share=False, format="+.3f"
)
ABOVE_CHANCE = Quantity(
    "above_chance",
    "above chance",
    unit="%",
    share=True,
    format=".1f",
    leads=True,
    better="higher",
    help="the same ratio after the chance level is taken from both: what is left of the part above "
    "guessing",
)
LOSSES_WINS = Quantity(
    "lost_won",
    "losses/wins",
    unit="items",
    format=".0f",
    better="lower",
    help="items the teacher has right and the student wrong / the reverse, mean over seeds",
)
LOSSES = Quantity(
    "lost",
    "losses",
    unit="items",
    format=".0f",
    better="lower",
    term="",
    help="items that the teacher has right and the row wrong, mean over seeds",
)
WINS = Quantity(
    "won",
    "wins",
    unit="items",
    format=".0f",
    better="higher",
    term="",
    help="items that the row has right and the teacher wrong, mean over seeds",
)
KL = Quantity(
    "kl",
    "KL",
    unit="nats",
    format=".3f",
    better="lower",
    help="divergence of the student's distributions from the teacher's, nats a question's choices "
    "or a token of the teacher's answers, "
    "with the half-width of its 95 % interval over items and seeds",
)
HALF_WIDTH = Quantity(
    "half_width", "half-width", term="", help="half of the 95 % interval of the number before it"
)
TOP1_AGREEMENT = Quantity(
    "agreement",
    "top-1 agreement",
    unit="%",
    share=True,
    format=".1f",
    better="higher",
    help="share of those in which both put the same choice or token first",
)
_TEXT = "on the first tokens of the task's texts, with its 95 % interval over texts"
TEXT_KL = Quantity(
    "text_kl",
    "KL a token",
    unit="nats",
    stored="nats",
    format=".4f",
    better="lower",
    help=f"mean divergence of the student's distributions from the teacher's {_TEXT} (of several "
    "seeds from the lowest to the highest end)",
)
TEXT_KL_MEDIAN = replace(
    TEXT_KL,
    key="text_kl_median",
    header="median KL",
    help=f"half of the tokens are below it, {_TEXT}",
)
TEXT_KL_90 = replace(
    TEXT_KL, key="text_kl_90", header="90 % KL", help=f"90 % of the tokens are below it, {_TEXT}"
)
TEXT_KL_99 = replace(
    TEXT_KL, key="text_kl_99", header="99 % KL", help=f"99 % of the tokens are below it, {_TEXT}"
)
TEXT_KL_999 = replace(
    TEXT_KL,
    key="text_kl_999",
    header="99.9 % KL",
    help=f"99.9 % of the tokens are below it, {_TEXT}",
)
TEXT_KL_MAX = replace(
    TEXT_KL, key="text_kl_max", header="maximum KL", help="the largest of all tokens"
)
PROBABILITY_CHANGE = Quantity(
    "probability_change",
    "RMS change",
    unit="points",
    share=True,
    format=".2f",
    better="lower",
    help=f"root mean square of the change in the right token's probability {_TEXT}",
)
SAME_TOP = Quantity(
    "same_top",
    "same token first",
    unit="%",
    share=True,
    format=".1f",
    better="higher",
    help=f"share of tokens that both models put first {_TEXT}",
)
PROMPT_LENGTH = Quantity(
    "prompt_length",
    "tokens before",
    words=True,
    term="",
    help="how many tokens of the text stand before those that the line is of",
)
_BAND = (
    "of rows with a quantized cache, on the tokens of the same texts that have so many before "
    "them, with its 95 % interval over texts"
)
KL_AT_LENGTH = replace(
    TEXT_KL,
    key="kl_at_length",
    header="KL at length",
    help=f"mean divergence of the student's distributions from the teacher's {_BAND}",
)
PERPLEXITY_AT_LENGTH = Quantity(
    "perplexity_at_length",
    "perplexity at length",
    stored="ratio",
    unit="x",
    prefix="x",
    format=ratio_format,
    better="lower",
    help=f"student's perplexity by token / teacher's, {_BAND}",
)
PERPLEXITY = Quantity(
    "perplexity",
    "perplexity",
    format=".2f",
    leads=True,
    better="lower",
    help="by word, as lm-eval counts words, or by byte where that is the task's metric; lower is "
    "better",
)
BITS_PER_BYTE = Quantity(
    "bits_per_byte",
    "bits per byte",
    unit="bits",
    format=".3f",
    leads=True,
    better="lower",
    help="the same text in bits for each of its bytes; lower is better",
)
AGAINST_TEACHER = Quantity(
    "against_teacher",
    "against teacher",
    unit="x",
    prefix="x",
    format=ratio_format,
    leads=True,
    better="lower",
    help="student's perplexity (or error) / teacher's, with its 95 % interval over documents (or "
    "items)",
)
RATIO = Quantity(
    "ratio",
    "ratio",
    unit="x",
    prefix="x",
    format=ratio_format,
    better="lower",
    term="",
    help="the row's perplexity (or error) / the other's; below 1 is better",
)
LOW = Quantity("low", LOW_END, term="", help="lower end of the 95 % interval, or of a range")
HIGH = Quantity("high", HIGH_END, term="", help="upper end of the 95 % interval, or of a range")
CORRECT_BY = Quantity(
    "correct_by",
    "correct by",
    words=True,
    help="accuracy by each extractor or metric; the first is the score's own",
)
MACRO = Quantity(
    "macro",
    "macro",
    better="higher",
    help="mean accuracy over subjects, or over problems' numbers of steps",
)
PICKED = Quantity(
    "picked",
    "picked",
    unit="%",
    share=True,
    format=".0f",
    words=True,
    help="how often each position was chosen, in percent",
)
# Of answers and prompts that were cut no way is better in a sort: whoever sorts by them wants to
# see where most were.
TRUNCATED = Quantity(
    "truncated_share",
    "truncated",
    unit="%",
    share=True,
    format=".1f",
    help="answers that ran into the longest length",
)
CUT_PROMPTS = Quantity(
    "cut_prompts",
    "cut prompts",
    format=".0f",
    help="requests longer than the context, which lost tokens on the left as in lm-eval",
)
TOKENS = Quantity(
    "tokens_per_answer",
    "tokens",
    unit="tokens",
    format=".1f",
    help="tokens written per answer, the ending one included",
)
INVALID = Quantity(
    "invalid_share",
    "invalid",
    unit="%",
    share=True,
    format=".1f",
    better="lower",
    help="share of answers in which the primary extractor finds nothing",
)

# Speed.
KEEPS = Quantity(
    "keeps",
    "keeps 95 %",
    words=True,
    help="whether the whole retention interval (of a choice task that above chance) lies above 95 "
    "% (yes) or below (no) on every task; "
    "not judged where the teacher is at chance; speed counts only beside it",
)
FRONT = Quantity(
    "front",
    "front",
    words=True,
    help="whether a row is not dominated in what it keeps, speed and size on disk. Its rival is "
    "the row that keeps most of those no larger and not shown to be slower. yes: none, or shown to "
    "be better than it on a task; no: the rival is shown to keep up (within 2 points on every task "
    "and 5 % of the speed) and to be smaller, faster or better; Holm over the rows",
)
DECODE_X = Quantity(
    "decode_speedup",
    "decode x",
    stored="ratio",
    unit="x",
    format=".2f",
    better="higher",
    axis="decode speed over the teacher's",
    help="teacher's seconds per written token / the student's, by turns in processes of their own: "
    "lower quartiles of a round, "
    "geometric mean and 95 % bootstrap interval over rounds (several seeds: over seeds); in "
    "brackets where quality is lost",
)
EAGER_DECODE_X = Quantity(
    "eager_decode_speedup",
    "eager decode x",
    stored="ratio",
    unit="x",
    format=".2f",
    better="higher",
    help="decode x of steps that are launched kernel by kernel, on a GPU where decode x is of "
    "captured steps: what a server without graphs sees, mostly Python's time where batches are "
    "small",
)
PREFILL_X = Quantity(
    "prefill_speedup",
    "prefill x",
    stored="ratio",
    unit="x",
    format=".2f",
    better="higher",
    help="the same for reading the prompt and choosing the first token",
)
DECODE_RATE = Quantity(
    "decode_tokens_per_second",
    "decode tok/s",
    stored="tokens/s",
    unit="tok/s",
    format=",.0f",
    better="higher",
    help="batch x (new tokens - 1) / (end to end - first token), median; EOS off",
)
PREFILL_RATE = Quantity(
    "prefill_tokens_per_second",
    "prefill tok/s",
    stored="tokens/s",
    unit="tok/s",
    format=",.0f",
    better="higher",
    help="batch x prompt tokens / time to first token, median",
)
TTFT = Quantity(
    "ttft_seconds",
    "TTFT ms",
    stored="s",
    unit="ms",
    scale=1000.0,
    format=".3g",
    better="lower",
    help="time to first token: prefill and the choice of one token, tokenising not in it",
)
TPOT = Quantity(
    "tpot_seconds",
    "TPOT ms",
    stored="s",
    unit="ms",
    scale=1000.0,
    format=".3g",
    better="lower",
    help="time per output token after the first",
)
EAGER_TPOT = Quantity(
    "eager_tpot_seconds",
    "eager TPOT ms",
    stored="s",
    unit="ms",
    scale=1000.0,
    format=".3g",
    better="lower",
    help="TPOT of steps that are launched kernel by kernel, on a GPU where the others are captured",
)
STEPS = Quantity(
    "decode_steps",
    "steps",
    words=True,
    help="on a GPU: captured (a step is one CUDA graph, for the teacher too), or eager (launched "
    "kernel by kernel); bound by launches where the GPU works for less than 80 % of an eager "
    "step's time",
)
# Below this share of its time a run is bound by launches: without the waits it would be a quarter
# faster at the least.
BUSY_SHARE = 0.8
NOT_CAPTURED = "skipped_decode_capture"  # the measurement whose remark says why
DECODE_BUSY = Quantity(
    "decode_busy_share",
    "decode busy",
    stored="share",
    unit="%",
    share=True,
    format=".0f",
    help="share of an eager decoding's time in which the GPU computes; the rest waits for Python",
)
PREFILL_BUSY = Quantity(
    "prefill_busy_share",
    "prefill busy",
    stored="share",
    unit="%",
    share=True,
    format=".0f",
    help="share of a prefill's time in which the GPU computes; the rest waits for Python",
)
PER_PROBLEM = Quantity(
    "seconds_per_problem",
    "s/problem",
    stored="s",
    unit="s",
    format=".3g",
    better="lower",
    task_last=True,
    help="seconds per problem of the scored run, batched, natural answer lengths",
)
PER_CORRECT = Quantity(
    "seconds_per_correct",
    "s/correct",
    stored="s",
    unit="s",
    format=".3g",
    better="lower",
    task_last=True,
    help="the same divided by the share that is right",
)
LENGTH_X = Quantity(
    "length_ratio",
    "length x",
    unit="x",
    format=".2f",
    task_last=True,
    help="tokens of a student's answer / the teacher's; ! outside 90 to 110 %, the band in which "
    "MLPerf takes speeds for comparable",
)
SCENARIO = Quantity(
    "scenario",
    "scenario",
    words=True,
    term="",
    help="prompt tokens, new tokens and batch of what was timed",
)
END_TO_END_X = Quantity(
    "end_to_end_speedup",
    "end to end x",
    stored="ratio",
    unit="x",
    format=".2f",
    better="higher",
    term="",
    help="the same of a whole answer",
)
END_TO_END = Quantity(
    "end_to_end_seconds",
    "end to end s",
    stored="s",
    unit="s",
    format=".3g",
    better="lower",
    term="",
    help="from the prompt to the last token, median",
)
GAP_P90 = Quantity(
    "itl_p90_seconds",
    "p90 gap ms",
    stored="s",
    unit="ms",
    scale=1000.0,
    format=".3g",
    better="lower",
    term="",
    help="nine of ten gaps between two tokens are shorter",
)

# Bytes.
DISK = Quantity(
    "weight_bytes_disk",
    "disk MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=mebibytes_format,
    better="lower",
    term="disk",
    help="bytes of the weight files; (x) the teacher's / the student's",
)
DISK_X = Quantity(
    "weight_bytes_disk_ratio",
    "disk x",
    unit="x",
    format=".2f",
    better="higher",
    term="disk",
    axis="teacher's weight bytes on disk over the student's",
    help=DISK.help,
)
WEIGHTS = Quantity(
    "weight_bytes_resident",
    "weights MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=mebibytes_format,
    better="lower",
    term="weights",
    help="bytes of parameters and buffers in memory, each storage once, in the dtype of the table",
)
WEIGHTS_X = Quantity(
    "weight_bytes_resident_ratio",
    "weights x",
    unit="x",
    format=".2f",
    better="higher",
    term="weights",
    axis="teacher's weight bytes in memory over the student's",
    help=WEIGHTS.help,
)
KV = Quantity(
    "kv_bytes",
    "KV MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=mebibytes_format,
    better="lower",
    term="KV",
    help="bytes of keys and values at the end of a run, counted, checked against 2 L B T H d",
)
KV_PER_TOKEN = Quantity(
    "kv_bytes_per_token",
    "KV bytes a token",
    stored="bytes",
    unit="bytes",
    format=",.0f",
    better="lower",
    help="bytes of keys and values of one token in all layers, as they are stored, scales included",
)
ACTIVATIONS = Quantity(
    "activation_bytes",
    "activations MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=mebibytes_format,
    better="lower",
    term="activations",
    help="the rest of the peak: peak - weights - KV",
)
PEAK = Quantity(
    "decode_peak_bytes",
    "peak MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=",.2f",
    better="lower",
    term="peak",
    help="how far a run lifts a fresh process's memory above what it held before the model was "
    "opened (CPU: resident; GPU: allocated, without the CUDA context)",
)
PREFILL_PEAK = Quantity(
    "prefill_peak_bytes",
    "prefill peak MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=",.2f",
    better="lower",
    term="",
    help=PEAK.help,
)
RESERVED = Quantity(
    "reserved_bytes",
    "reserved MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=",.2f",
    better="lower",
    term="reserved",
    help="the same of the GPU's caching allocator",
)
PROCESS_PEAK = Quantity(
    "peak_process_bytes",
    "process MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=",.0f",
    better="lower",
    term="",
    help="the most memory that a cell's process held",
)
LOAD = Quantity(
    "load_seconds",
    "load s",
    stored="s",
    unit="s",
    format=".3g",
    better="lower",
    help="opening the model in a fresh process, imports not counted, files perhaps in the page "
    "cache",
)
FIRST_CALL = Quantity(
    "first_call_seconds",
    "first call s",
    stored="s",
    unit="s",
    format=".3g",
    better="lower",
    help="the first full run, which pays for what later runs find ready",
)

# What making a student took.
TOKENS_SEEN = Quantity(
    "seen_tokens",
    "tokens seen",
    stored="tokens",
    unit="tokens",
    format=",.0f",
    better="lower",
    help="tokens that passed through the student in training, prompts included, padding not",
)
TOKENS_TRAINED = Quantity(
    "trained_tokens",
    "tokens trained",
    stored="tokens",
    unit="tokens",
    format=",.0f",
    better="lower",
    help="tokens that had a loss",
)
TRAIN_SECONDS = Quantity(
    "seconds",
    "train s",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="seconds in the training loop; of methods without training, of making the student; of a "
    "chain, all its stages",
)
DEVICE_SECONDS = Quantity(
    "device_seconds",
    "device s",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="the same times the devices",
)
FLOPS = Quantity(
    "flops",
    "FLOPs",
    stored="FLOP",
    unit="FLOP",
    format=".2e",
    better="lower",
    help="training: 3 x forward (2 per weight outside the embedding, head and attention included) "
    "x seen tokens",
)
TRAINING_PEAK = replace(PEAK, key="peak_bytes", format=",.0f")
ENERGY = Quantity(
    "energy_joules",
    "energy J",
    stored="J",
    unit="J",
    format=",.0f",
    better="lower",
    help="of the CPU packages (RAPL) or the GPU (NVML) while it trained; a dash where no counter "
    "can be read",
)
TEACHER_SECONDS = Quantity(
    "teacher_seconds",
    "teacher s",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="seconds of the teacher's forward passes for this row alone, within train s",
)
TEACHER_FLOPS = Quantity(
    "teacher_flops",
    "teacher FLOPs",
    stored="FLOP",
    unit="FLOP",
    format=".2e",
    better="lower",
    help="its forward passes for this row alone",
)
TEACHER_TOKENS = Quantity(
    "teacher_tokens",
    "teacher tokens",
    stored="tokens",
    unit="tokens",
    format=",.0f",
    better="lower",
    term="",
    help="tokens that the teacher read or wrote for this row alone",
)
RATE = Quantity(
    "learning_rate",
    "rate",
    format="g",
    help="learning rate: as set, or by the student's size; with --tune chosen on held-out training "
    "rows, once for all seeds",
)
SHARED_SECONDS = Quantity(
    "shared_seconds",
    "shared s",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="seconds that shared work took when it was made: the teacher's traces and distributions, "
    "the search for a learning rate",
)
SHARED_SECONDS_PER_ROW = Quantity(
    "share_seconds",
    "shared s/row",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="the same divided by the rows of this table that use it",
)

# Claims.
CLAIMED_RETENTION = Quantity(
    "claimed_retention",
    "accuracy retention",
    unit="%",
    format=".1f",
    better="higher",
    term="",
    help="how much of the teacher's score the student keeps, in per cent",
)
CLAIMED_SPEED = Quantity(
    "claimed_speed",
    "decode speedup",
    unit="x",
    format=".2f",
    better="higher",
    term="",
    help="how many times faster the student decodes",
)
CLAIMED_MEMORY = Quantity(
    "claimed_memory",
    "memory reduction (disk)",
    unit="x",
    format=".2f",
    better="higher",
    term="",
    help="how many times smaller its weight files are",
)
CLAIMED_COST = Quantity(
    "claimed_cost",
    "training cost",
    unit="s",
    format=".1f",
    better="lower",
    term="",
    help="seconds of making the student",
)
ALL_AT_ONCE = Quantity(
    "all_at_once",
    "all at once",
    words=True,
    term="",
    help="the low ends of all claims together, of one row",
)
METHOD = Quantity(
    "method",
    "method",
    words=True,
    term="",
    help="the family of methods that is claimed of, or the method's own name",
)
QUANTITY = Quantity("quantity", "quantity", words=True, term="", help="what is claimed")
MEASURED = Quantity(
    "measured",
    "measured",
    words=True,
    term="",
    help="the lowest and the highest value over the rows of this table",
)
CLAIMED = Quantity(
    "claimed",
    "claimed",
    words=True,
    help="what comparisons of compression methods keep repeating; *holds here* names a row that "
    "was shown to reach the low end "
    "(retention: the gate's test on every task, Holm over the family's rows; speed: its interval; "
    "a chain: it keeps 80 % and every"
    " single method as small is shown to be worse on a task), *does not*: every row was shown not "
    "to; else *cannot tell*",
)
PUBLISHED = Quantity(
    "published",
    "published",
    words=True,
    help="ranges over the records in assets/published.json that were read first-hand, with the "
    "models' sizes in parameters; other"
    " harnesses, other ways of timing, other kinds of memory",
)

# Rows against rows.
AGAINST = Quantity(
    "against", "against", words=True, term="", help="the row that this one stands against"
)
GAP = Quantity(
    "gap",
    "difference (points)",
    unit="points",
    share=True,
    format="+.1f",
    help="row's score - the other row's on the same items, with the 95 % interval of this line "
    "alone; perplexities and errors: their "
    "ratio, below 1 is better",
)
GAP_OF_NUMBERS = replace(GAP, key="gap_of_numbers", unit="", share=False, format="+.3f")
GAP_AS_RATIO = replace(
    GAP, key="gap_as_ratio", unit="x", share=False, prefix="x", format=ratio_format
)
P = Quantity(
    "p", "p", format=".2g", term="", help="two-sided p of no difference, of this line alone"
)
P_HOLM = Quantity(
    "p_holm",
    "p (Holm)",
    format=".2g",
    help="two-sided p of no difference, adjusted over the lines of the table that are judged",
)
VERDICT = Quantity(
    "verdict",
    "verdict",
    words=True,
    help="better or worse at p (Holm) <= .05, else cannot tell; a method trained (or drawn) once "
    "is not judged: one training says "
    "nothing of the next",
)
DROP_SHOWN = Quantity(
    "drop_shown",
    "drop shown",
    unit="points",
    share=True,
    format=".1f",
    help="the smallest true drop that these items show with power .8 (one-sided .05) at this row's "
    "own share of flips, in points",
)
ITEMS_NEEDED = Quantity(
    "items_needed",
    "items for 1/2/5 %",
    words=True,
    help="how many of the task's items (or documents) show a true loss of 1, 2 and 5 % of the "
    "teacher's figure with power .8 (one-sided .05), at this row's own share of flips or scatter",
)

# Chains.
STAGE = Quantity(
    "stage",
    "stage",
    words=True,
    help="a chain up to here: what that student scored in its own row, what it weighs, what this "
    "stage alone took",
)
_OF_THE_PARTS = "of the parts"
RETENTION_OF_PARTS = replace(
    RETENTION,
    key="retention_of_parts",
    header=f"{RETENTION.header} {_OF_THE_PARTS}",
    better="none",
    leads=False,
    term=_OF_THE_PARTS,
    help="product of what the chain before its last stage keeps (or gains) and what the last stage "
    "alone does: the measured whole "
    "beside it says whether gains multiply",
)
SIZE = Quantity(
    "weight_bytes",
    "MiB",
    stored="bytes",
    unit="MiB",
    scale=1 / MIB,
    format=",.2f",
    better="lower",
    term="",
    help="bytes of the weight files after this stage",
)
SIZE_OF_PARTS = replace(
    SIZE,
    key="weight_bytes_of_parts",
    header=f"{SIZE.header} {_OF_THE_PARTS}",
    better="none",
    term=_OF_THE_PARTS,
    help=RETENTION_OF_PARTS.help,
)
DECODE_X_OF_PARTS = replace(
    DECODE_X,
    key="decode_speedup_of_parts",
    header=f"{DECODE_X.header} {_OF_THE_PARTS}",
    better="none",
    axis="",
    term=_OF_THE_PARTS,
    help=RETENTION_OF_PARTS.help,
)
STAGE_SECONDS = Quantity(
    "stage_seconds",
    "stage s",
    stored="s",
    unit="s",
    format=".1f",
    better="lower",
    help="seconds that this stage took",
)
MONEY = Quantity(
    "money", "money", format=".4f", better="lower", help="price x (device s + shared s/row)"
)

# What the page works out beside its tables.
LOWEST = Quantity(
    "lowest",
    "lowest",
    unit="%",
    share=True,
    format=".1f",
    better="higher",
    term="",
    help="the lowest retention over the tasks",
)
NET = Quantity(
    "net",
    "net",
    unit="items",
    format="+.0f",
    better="higher",
    term="",
    help="items won less items lost",
)
CHANGED = Quantity(
    "changed",
    "changed %",
    unit="%",
    share=True,
    format=".1f",
    better="lower",
    term="",
    help="share of the items that were lost or won",
)
SUBJECT = Quantity(
    "subject",
    "subject",
    words=True,
    term="",
    help="a part of a task: a subject, or a number of steps",
)
TEACHER = Quantity("teacher", "teacher", term="", help="the teacher, or its figure")
STUDENT = Quantity("student", "student", term="", help="the student, or its figure")

# What the gate, a baseline and a model card say.
LAYER = Quantity(
    "layer",
    "layer",
    words=True,
    term="",
    help="which kind of check it was: row, claim, frozen, pooled, bytes, speed",
)
WHY = Quantity("why", "why", words=True, term="", help="what was found, in words")
SEED = Quantity("seed", "seed", term="", help="the seed of a training or draw")
ITEMS = Quantity(
    "items", "items", unit="items", format=",", term="", help="how many items were scored"
)
N = Quantity(
    "n",
    "n",
    format=",",
    term="",
    help="how many items (of a measurement: values) stand behind the figure",
)
FIRST_ACCEPTED = Quantity(
    "first_accepted",
    "first accepted",
    words=True,
    term="",
    help="the first value that a baseline took, with its day and reason",
)
OWN_MARGIN = Quantity(
    "own_margin",
    "own margin",
    words=True,
    term="",
    help="what this row must keep, where it is not what the others must",
)
BYTES = Quantity(
    "bytes",
    "bytes",
    stored="bytes",
    unit="bytes",
    format=",",
    better="lower",
    term="",
    help="bytes of the weight files",
)
CHANGE = Quantity(
    "change", "change", words=True, term="", help="what changed between two baselines"
)
FLIPS = Quantity(
    "noise_flips",
    "flips",
    stored="fraction",
    unit="%",
    share=True,
    format=".1f",
    better="lower",
    term="",
    help="share of the items that flip without a cause, and how that is known",
)
SEES_FROM = Quantity(
    "sees_from",
    "sees drops from",
    unit="points",
    share=True,
    format=".1f",
    term="",
    help="the smallest true drop that a check would call regressed (power .8)",
)
EQUAL_ONLY = Quantity(
    "equal_only",
    "only equal answers pass",
    term="",
    help="below how many items nothing passes but the same answers",
)

# What `harness measure` and `harness plan` print.
MODEL = Quantity("model", "model", words=True, term="", help="the model that was timed or weighed")
DEVICE_MEMORY = Quantity(
    "device_memory",
    "memory a device",
    stored="bytes",
    unit="GiB",
    scale=1 / GIB,
    format=".1f",
    better="lower",
    term="",
    help="what a stage takes of each device",
)
LAYOUT = Quantity(
    "layout", "layout", words=True, term="", help="how a stage would lie on the devices"
)
TIME = Quantity(
    "time", "time", better="lower", term="", help="how long a stage is expected to take"
)
NOTE = Quantity("note", "note", words=True, term="", help="what else is known of a stage")
PLANNED_TOKENS = replace(
    TOKENS, key="planned_tokens", format=",.0f", term="", help="tokens that a stage reads or writes"
)
PLANNED_MONEY = replace(
    MONEY, key="planned_money", format=",.2f", term="", help="price x hours x devices"
)
MEASURED_PEAK = replace(PEAK, key="measured_peak", format=",.1f")

# What the pandas frame holds beside these.
KEY = Quantity("key", "key", words=True, term="", help="the cell's key")
REASON = Quantity("reason", "reason", words=True, term="", help="why a cell has no result")
SUITE = Quantity(
    "suite", "suite", words=True, term="", help="the suites that the run was asked for"
)
BUDGET = Quantity(
    "budget",
    "budget",
    unit="tokens",
    format=",",
    term="",
    help="tokens that each trained row may see",
)
DEVICE = Quantity("device", "device", words=True, term="", help="what the cell ran on")
METRIC = Quantity(
    "metric", "metric", words=True, term="", help="the task's extractor, or the measurement's name"
)
VALUE = Quantity("value", "value", term="", help="the figure, as its record holds it")
STDERR = Quantity("stderr", "stderr", term="", help="its standard error over items")
UNIT = Quantity("unit", "unit", words=True, term="", help="the unit of the figure")

QUANTITIES = tuple(value for value in list(globals().values()) if isinstance(value, Quantity))
FRAME = (
    KEY,
    ROW,
    METHOD,
    CONTROL,
    SEED,
    STATUS,
    REASON,
    TEACHER,
    STUDENT,
    SUITE,
    BUDGET,
    DEVICE,
    METRIC,
    TASK,
    VALUE,
    STDERR,
    N,
    UNIT,
)


def quantity_of(column: str) -> Quantity | None:
    """Return the quantity of a column by its text, a task's name beside it or not."""
    if isinstance(column, Header):
        return column.quantity
    candidates = [quantity for quantity in QUANTITIES if _fits(quantity, column)]
    return max(candidates, key=lambda quantity: len(quantity.header), default=None)


def _fits(quantity: Quantity, column: str) -> bool:
    if quantity.task_last:
        return f"{column} ".startswith(f"{quantity.header} ")
    return f" {column}".endswith(f" {quantity.header}")
