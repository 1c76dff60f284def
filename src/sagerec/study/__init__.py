"""The study: objectives under equal conditions, tuned with equal effort, tested with the same users.

    STUDY/run/            a run: dataset, split, Semantic IDs, one supervised policy, and policy-ROW-sSEED for each row
    STUDY/trials/         one JSON a trial of the tuning: settings, validation metrics, criterion
    STUDY/study.json      the table: rows with intervals, tests between them, what was run

One supervised policy; then for each objective the same number of trials over its own settings, the first those that all
share (which were found on sage: docs/log.md), all with one seed and the same events, rewards, rollouts and budget; the
settings that win by the criterion on validation run with every seed and are evaluated on test. The control `sft` is
always there. Every trial and row is a job that is skipped where its result is there, so a study that was stopped goes
on; jobs run in parallel processes. Baselines learn from the same events, SASRec with as many trials.
"""

from sagerec.study.design import STUDY, CompareSettings, StudySettings
from sagerec.study.study import run_study

__all__ = ["STUDY", "CompareSettings", "StudySettings", "run_study"]
