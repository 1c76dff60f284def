"""The study: objectives under equal conditions, tuned with equal effort, tested with the same users.

    STUDY/run/            the run of seed 0: dataset, split, Semantic IDs, a supervised policy, one that learnt all
                          events at once, and policy-ROW-s0 for each row
    STUDY/run-sSEED/      the same of each other seed, with the same split
    STUDY/trials/         one JSON a trial of the tuning: settings, validation metrics, criterion
    STUDY/study.json      the table: rows with intervals, tests between them, what was run

Each seed has Semantic IDs and unaligned policies of its own, from which its alignments start. On seed 0, each objective
has the same number of trials over its own settings, the first those that all share (which were found on sage:
docs/log.md), all with the same events, rewards, rollouts and budget; the settings that win by the criterion on
validation run with every seed and are evaluated on test. The control `sft`, supervised training that goes on, and the
reference `all-at-once`, which learns training and reserved events together, are always there: an alignment that does
not beat both has added nothing. What is compared is named before anything runs (`design.comparisons`).

Every trial and row is a job that is skipped where its result is there, so a study that was stopped goes on; jobs run in
parallel processes. Baselines learn from the same events, SASRec with as many trials.
"""

from sagerec.study.design import STUDY, CompareSettings, StudySettings
from sagerec.study.study import run_study

__all__ = ["STUDY", "CompareSettings", "StudySettings", "run_study"]
