#!/bin/bash
# All stages of an experiment as Slurm jobs that wait for each other, in the order of `make recipe`:
#
#   NODES=4 scripts/slurm/recipe.sh instructgpt_6b            # on the login machine; it submits and returns
#   NODES=4 ARGS_rm="optim.lr=5e-6" scripts/slurm/recipe.sh instructgpt_1b
#
# A stage is conf/experiment/<EXP>_<stage>.yaml; one that is not there is left out, one that is done is not submitted unless
# a stage before it is. The last job evaluates and reports. The same command after a failure submits what is left.
#
#   NODES, NODES_<stage>  machines (2)          GPUS  processes and GPUs of each (8)
#   ARGS, ARGS_<stage>    config overrides, for every stage or one
#   RUNS                  folder of the runs (runs), one that all machines see
#   RM_EXP                whose reward model, as in the Makefile
#   SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...: sbatch reads them itself
# The demo has steps of its own between its stages and runs in minutes: `make demo`.

set -euo pipefail

if (( $# != 1 )); then
    echo "usage: [NODES=N] [GPUS=N] [ARGS=...] $0 EXP" >&2
    exit 2
fi
exp=$1
runs=${RUNS:-runs}
here=$(dirname "$0")
all=()       # jobs submitted

if ! compgen -G "conf/experiment/${exp}_*.yaml" > /dev/null; then
    echo "$exp: there is no conf/experiment/${exp}_<stage>.yaml in $PWD" >&2
    exit 2
fi

has() { [[ -f conf/experiment/$1.yaml ]]; }

# submit STAGE EXPERIMENT FOLDER [JOB]...: sets `job`, to nothing where the stage is done and nothing before it is to do.
submit() {
    local stage=$1 experiment=$2 folder=$3 after
    shift 3
    after=$(printf '%s\n' "$@" | sed '/^$/d' | paste -sd:)
    job=''
    if [[ -z $after && -f $folder/artifact/artifact.json ]]; then
        return
    fi
    local nodes=NODES_$stage more=ARGS_$stage
    # afterok: a stage that failed has no successors; with --kill-on-invalid-dep they leave the queue instead of staying there.
    # A stage that is requeued is not done, and its successors wait on. ARGS are split at blanks, as make does it.
    # shellcheck disable=SC2086
    job=$(sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} --job-name="$experiment" \
        --nodes="${!nodes:-${NODES:-2}}" --ntasks-per-node="${GPUS:-8}" --gpus-per-node="${GPUS:-8}" \
        "$here/train.sbatch" "$stage" experiment="$experiment" runs="$runs" ${ARGS:-} ${!more:-})
    job=${job%%;*}  # of several clusters, sbatch names the cluster behind the number
    all+=("$job")
    echo "$job $experiment${after:+ after $after}"
}

rm_exp=${RM_EXP:-}
if [[ -z $rm_exp ]]; then
    if has "${exp}_rm"; then rm_exp=$exp; elif [[ $exp == instructgpt_* ]]; then rm_exp=instructgpt_6b; fi
fi

base='' sft='' rm=''
if has "${exp}_pretrain"; then submit pretrain "${exp}_pretrain" "$runs/$exp/pretrain"; base=$job; fi
if has "${exp}_sft"; then submit sft "${exp}_sft" "$runs/$exp/sft" "$base"; sft=$job; fi
start=$sft
if has "${exp}_ppo_init_sft"; then submit sft "${exp}_ppo_init_sft" "$runs/${exp}_ppo_init/sft"; start=$job; fi
if [[ -n $rm_exp ]]; then
    parent=''
    if [[ $rm_exp == "$exp" ]]; then parent=$sft; fi
    submit rm "${rm_exp}_rm" "$runs/$rm_exp/rm" "$parent"
    rm=$job
fi
if has "${exp}_ppo"; then submit ppo "${exp}_ppo" "$runs/$exp/ppo" "$start" "$rm"; fi
if has "${exp}_dpo"; then submit dpo "${exp}_dpo" "$runs/$exp/dpo" "$sft"; fi

# What is left for make, which finds every model made: evaluations and the report, by one process.
after=$(IFS=:; echo "${all[*]}")
job=$(sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} --job-name="${exp}_report" \
    --nodes=1 --ntasks=1 --gpus-per-node=1 --output=%x-%j.log --wrap="make recipe EXP=$exp RUNS=$runs${RM_EXP:+ RM_EXP=$RM_EXP}")
echo "${job%%;*} ${exp}_report${after:+ after $after}"
