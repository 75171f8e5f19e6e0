"""What every column of every table means: no word stands in a table without a line here."""

GLOSSARY = {
    "row": "the method that made the student; settings that differ from the defaults in brackets",
    "family": "the kind of method; rows of one family stand together, controls last",
    "seeds": "independent training runs, pooled; 1 for rows without a random draw",
    "score": "accuracy, or the task's own metric, by its primary extractor, mean over seeds; bold: the best row and all not significantly "
    "worse",
    "error": "the same of a metric that is better when lower",
    "retention": "student's score / teacher's score on the same items, with its 95 % interval (one training: paired score interval over "
    "items, of this checkpoint; several: Student's t over trainings and items, of the method; items that carry numbers: paired means)",
    "difference": "student's figure - teacher's, of a figure that all items make together (F1, BLEU), with its 95 % interval: items drawn "
    "again, the same ones for both",
    "above chance": "the same ratio after the chance level is taken from both: what is left of the part above guessing",
    "lost/won": "items the teacher has right and the student wrong / the reverse, mean over seeds",
    "KL": "divergence of the student's distributions from the teacher's, nats a question's choices or a token of the teacher's answers, "
    "with the half-width of its 95 % interval over items and seeds",
    "same top": "share of those in which both put the same choice or token first",
    "perplexity": "by word, as lm-eval counts words, or by byte where that is the task's metric; lower is better",
    "bits per byte": "the same text in bits for each of its bytes; lower is better",
    "against teacher": "student's perplexity (or error) / teacher's, with its 95 % interval over documents (or items)",
    "correct by": "accuracy by each extractor or metric; the first is the score's own",
    "macro": "mean accuracy over subjects, or over problems' numbers of steps",
    "picked": "how often each position was chosen, in percent",
    "unended": "answers that ran into the longest length",
    "cut prompts": "requests longer than the context, which lost tokens on the left as in lm-eval",
    "tokens": "tokens written per answer, the ending one included",
    "invalid": "share of answers in which the primary extractor finds nothing",
    "keeps 95 %": "whether the whole retention interval (of a choice task that above chance) lies above 95 % (yes) or below (no) on every "
    "task; not judged where the teacher is at chance; speed counts only beside it",
    "decode x": "teacher's seconds per written token / the student's, by turns in processes of their own: lower quartiles of a round, "
    "geometric mean and 95 % bootstrap interval over rounds (several seeds: over seeds); in brackets where quality is lost",
    "prefill x": "the same for reading the prompt and choosing the first token",
    "decode tok/s": "batch x (new tokens - 1) / (end to end - first token), median; EOS off",
    "prefill tok/s": "batch x prompt tokens / time to first token, median",
    "TTFT ms": "time to first token: prefill and the choice of one token, tokenising not in it",
    "TPOT ms": "time per output token after the first",
    "s/problem": "seconds per problem of the scored run, batched, natural answer lengths",
    "s/correct": "the same divided by the share that is right",
    "length x": "tokens of a student's answer / the teacher's; ! outside 90 to 110 %, the band in which MLPerf takes speeds for comparable",
    "disk": "bytes of the weight files; (x) the teacher's / the student's",
    "weights": "bytes of parameters and buffers in memory, each storage once, in the dtype of the table",
    "KV": "bytes of keys and values at the end of a run, counted, checked against 2 L B T H d",
    "activations": "the rest of the peak: peak - weights - KV",
    "peak": "how far a run lifts a fresh process's memory above what it held before the model was opened (CPU: resident; GPU: allocated)",
    "reserved": "the same of the GPU's caching allocator",
    "load s": "opening the model in a fresh process, imports not counted, files perhaps in the page cache",
    "first call s": "the first full run, which pays for what later runs find ready",
    "seen": "tokens that passed through the student in training, prompts included, padding not",
    "trained": "tokens that had a loss",
    "train s": "seconds in the training loop; of methods without training, of making the student; of a chain, all its stages",
    "device s": "the same times the devices",
    "FLOPs": "training: 3 x forward (2 per weight outside the embedding, head and attention included) x seen tokens",
    "energy J": "of the CPU packages (RAPL) or the GPU (NVML) while it trained; a dash where no counter can be read",
    "teacher s": "seconds of the teacher's forward passes for this row alone, within train s",
    "teacher FLOPs": "its forward passes for this row alone",
    "rate": "learning rate: as set, or by the student's size; with --tune chosen on held-out training rows, once for all seeds",
    "shared s": "seconds that shared work took when it was made: the teacher's traces and distributions, the search for a learning rate",
    "its share s": "the same divided by the rows of this table that use it",
    "claimed": "what comparisons of compression methods keep repeating; *holds here* names a row that was shown to reach the low end "
    "(retention: the gate's test on every task, Holm over the family's rows; speed: its interval; a chain: it keeps 80 % and every single "
    "method as small is shown to be worse on a task), *does not*: every row was shown not to; else *cannot tell*",
    "published": "ranges over the records in harness/data/published.json that were read first-hand, with the models' sizes in parameters; "
    "other harnesses, other ways of timing, other kinds of memory",
    "difference (points)": "row's score - the other row's on the same items, with the 95 % interval of this line alone; perplexities and "
    "errors: their ratio, below 1 is better",
    "p (Holm)": "two-sided p of no difference, adjusted over the lines of the table that are judged",
    "verdict": "better or worse at p (Holm) <= .05, else cannot tell; a method trained (or drawn) once is not judged: one training says "
    "nothing of the next",
    "drop shown": "the smallest true drop that these items show with power .8 (one-sided .05) at this row's own share of flips, in points",
    "stage": "a chain up to here: what that student scored in its own row, what it weighs, what this stage alone took",
    "of the parts": "product of what the chain before its last stage keeps (or gains) and what the last stage alone does: the measured "
    "whole beside it says whether gains multiply",
    "stage s": "seconds that this stage took",
    "money": "price x (device s + its share s)",
}


def glossary() -> str:
    """Return the meaning of every column."""
    width = max(map(len, GLOSSARY))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in GLOSSARY.items())
