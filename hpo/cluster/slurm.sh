# What head_node.slurm and worker_node.slurm share; both source it. They define before:
#   log [sentence]               prints a line
#   die [exit code] [sentence]   ends the job
#   set_traps                    cleanup at the end and on signals

# -- settings of the site: cluster.env -------------------------------------------------------------------------------

problem=$(bash -n ./cluster.env 2>&1) || die 2 "${problem%%$'\n'*}"
set +Eeuo pipefail # the activation scripts of modules and conda do not run under these
failed() { # [exit code] [file] [line]; not the command, which may be one inside of a function such as `module`
	[[ $2 != ./cluster.env ]] || log "cluster.env: line $3: $(sed -n "$3p" ./cluster.env) failed with exit code $1"
}
trap 'failed $? "${BASH_SOURCE[0]}" $LINENO' ERR
script_arguments=("$@")
set -- # activation scripts read them
sourcing_cluster_env=1
source ./cluster.env
set -- "${script_arguments[@]}"
# whatever cluster.env has set:
sourcing_cluster_env='' scratch='' sockets='' ray='' asked=''
unset IFS CDPATH "${!SQUEUE_@}" && shopt -u failglob nullglob
set -Eeuo pipefail +f && set_traps
for name in WORKER_ACCOUNT WORKER_PARTITION WORKER_CONSTRAINT WORKER_TIME NETWORK_INTERFACE; do
	[[ -v $name ]] || printf -v "$name" '' # an older cluster.env may not have it
done
[[ -v WORKER_OPTIONS ]] || WORKER_OPTIONS=()

read -ra container <<< "${CONTAINER-}" # comes before each python and ray; its own Python is used
if [[ ! ${CONTAINER-} && ${VENV-} ]]; then
	[[ -x $VENV/bin/python ]] || die 2 "there is no $VENV/bin/python: make the environment, or set VENV in cluster.env"
	export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
fi

# -- functions -------------------------------------------------------------------------------------------------------

ask() { # [command ...]: sets $answer to its first line, or to nothing. A signal is handled while it runs, not after it.
	local output
	exec {output}< <(exec "$@" 2> /dev/null)
	asked=$!
	answer=''
	read -r -u "$output" answer || true
	exec {output}<&-
	asked=''
}

run_and_wait() { # [command ...]: runs it. A signal is handled while it runs, not after it.
	local code=0
	"$@" &
	asked=$!
	wait "$asked" || code=$?
	asked=''
	return "$code"
}

ray_version() { # [exit code] [advice]: sets $answer to Ray's version, or ends the job
	ask "${container[@]}" python -c 'import ray; print(ray.__version__)'
	[[ $answer ]] || die "$1" "${CONTAINER:-$(command -v python || echo python)} cannot import ray: $2"
}

count_gpus() { # sets $gpus to the number of GPUs that this job has on this node; GPU_REQUEST=none: Slurm does not know
	local ids
	IFS=, read -ra ids <<< "${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS-}}"
	gpus=${SLURM_GPUS_ON_NODE:-${#ids[@]}}
	[[ ${GPU_REQUEST-} != none ]] || gpus=$GPUS_PER_NODE
}

has_line() { # [text] [line]
	[[ $'\n'$1$'\n' == *$'\n'$2$'\n'* ]]
}

my_jobs() { # prints the ids of this user's jobs, a line each; fails if Slurm does not answer, or leaves this job out
	local jobs
	jobs=$(timeout 10 squeue --all --me -h -o %A 2> /dev/null) || return 1
	has_line "$jobs" "$SLURM_JOB_ID" && echo "$jobs"
}

job_of() { # [folder]: prints the job whose folder it is; fails if it is not of this user and of this cluster
	local cluster job
	[[ -O $1 && ! -L $1 && -f $1/job ]] || return 1
	read -r cluster job < "$1/job" && [[ $cluster == "${SLURM_CLUSTER_NAME:-}" ]] && echo "$job"
}

remove_leftovers() { # [folder ...]: removes those of jobs that are no longer in the queue
	local folder job jobs
	jobs=$(my_jobs) || return 0
	for folder; do
		job=$(job_of "$folder") && ! has_line "$jobs" "$job" || continue
		rm -rf "$folder"
		log "removed $folder, which job $job has left behind"
	done
}

make_scratch() { # a folder on this node for temporary files ($scratch), and a short one for Ray's sockets ($sockets)
	local folder
	[[ -d ${TMPDIR-} ]] || TMPDIR=/tmp # it may be one of the login node
	remove_leftovers "$TMPDIR"/ray-?????? /tmp/ray-??????
	scratch=$(mktemp -d "$TMPDIR/ray-XXXXXX") || die "$1" "$TMPDIR on $SLURMD_NODENAME cannot be written" unfit
	sockets=$scratch
	((${#sockets} < 38)) || sockets=$(mktemp -d /tmp/ray-XXXXXX) # the paths of sockets may have at most 107 bytes
	for folder in "$scratch" "$sockets"; do echo "${SLURM_CLUSTER_NAME:-} $SLURM_JOB_ID" > "$folder/job"; done
	export TMPDIR=$scratch
}

wait_for_end() { # [tenths of a second] [process id ...]: fails if one of them is still there after this time
	local i
	for ((i = 0; i < $1; i++)); do kill -0 "${@:2}" 2> /dev/null || return 0; sleep 0.1; done
	return 1
}

are_alive() { # [session ids, with commas]: whether one of their processes is. Init may be slow to remove the dead.
	[[ $(ps -o stat= --sid "$1") =~ (^|$'\n')[^Z] ]]
}

stop_sessions() { # [session id ...]: ends all their processes, in a second
	local ids i
	ids=$(IFS=, && echo "$*")
	pkill -TERM --session "$ids" || return 0
	for i in {1..10}; do are_alive "$ids" || return 0; sleep 0.1; done
	kill_sessions "$@"
}

kill_sessions() { # [session id ...]: kills all their processes; repeats it, as one may have started another process
	local ids i
	ids=$(IFS=, && echo "$*")
	for i in {1..20}; do
		pkill -KILL --session "$ids" || return 0
		sleep 0.05
		are_alive "$ids" || return 0
	done
}

try_to_start_ray() { # [name in the log]: three times, with more patience each time; `start_ray [seconds]` starts it
	local try
	for try in 1 2 3; do
		if start_ray $((try * 60)); then return 0; fi
		log "$1 did not start (try $try): $(tail -n 1 "$scratch/log")"
		grep -hs Error "$sockets"/r/session_latest/logs/* | tail -n 3 || true
		stop_sessions "$ray"
		rm -rf "$sockets/r" # this run's own
	done
	return 1
}

ray_is_up() { # [seconds]: waits until Ray has started; fails if it ends, or after twice this time
	local i
	for ((i = 0; i < 10 * $1; i++)); do
		[[ ! -s $sockets/r/ray_current_cluster ]] || return 0
		kill -0 "$ray" 2> /dev/null || return 1
		! declare -F report_on_workers > /dev/null || report_on_workers # in the head
		sleep 0.2
	done
	return 1
}

address_of() { # [network interface]: prints its IPv4 address, or its IPv6 address if it has no other
	ip -o addr show dev "$1" scope global | awk '{split($4, a, "/"); print a[1]; exit}'
}
