# What head_node.slurm and worker_node.slurm share; both source it. They define before:
#   log [sentence]               prints a line
#   die [exit code] [sentence]   ends the job
#   set_traps                    cleanup at the end and on signals

# -- settings of the site: cluster.env -------------------------------------------------------------------------------

problem=$(bash -n ./cluster.env 2>&1) || die 2 "${problem%%$'\n'*}"
set +Eeuo pipefail # the activation scripts of modules and conda do not run under these
failed() { # [exit code] [file] [line] [command]
	[[ $2 != ./cluster.env ]] || log "cluster.env: line $3: $4 failed with exit code $1"
}
trap 'failed $? "${BASH_SOURCE[0]}" $LINENO "$BASH_COMMAND"' ERR
sourcing=1
source ./cluster.env
sourcing='' && unset IFS && set -Eeuo pipefail +f && set_traps # whatever cluster.env has set

read -ra container <<< "${CONTAINER-}" # comes before each python and ray; its own Python is used
if [[ ! ${CONTAINER-} && ${VENV-} ]]; then
	[[ -x $VENV/bin/python ]] || die 2 "there is no $VENV/bin/python: make the environment, or set VENV in cluster.env"
	export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
fi

# -- functions -------------------------------------------------------------------------------------------------------

asked=''
ask() { # [command ...]: sets $answer to its first line, or to nothing. A signal is handled while it runs, not after it.
	local output
	exec {output}< <(exec "$@" 2> /dev/null)
	asked=$!
	answer=''
	read -r -u "$output" answer || true
	exec {output}<&-
	asked=''
}

ray_version() { # sets $answer to Ray's version, or ends the job
	ask "${container[@]}" python -c 'import ray; print(ray.__version__)'
	[[ $answer ]] || die "$1" "${CONTAINER:-$(command -v python || echo python)} cannot import ray: $2"
}

wait_for_end() { # [tenths of a second] [process id ...]: fails if one of them is still there after this time
	local i
	for ((i = 0; i < $1; i++)); do kill -0 "${@:2}" 2> /dev/null || return 0; sleep 0.1; done
	return 1
}

stop_sessions() { # [session id ...]: ends all their processes, in a second
	local ids i
	ids=$(IFS=, && echo "$*")
	pkill -TERM --session "$ids" || return 0
	for i in {1..10}; do pkill -0 --session "$ids" || return 0; sleep 0.1; done
	pkill -KILL --session "$ids" || true
}

remove_leftovers() { # [folder ...]: removes those of this user's jobs that are no longer in the queue of this cluster
	local folder cluster job queue
	queue=$(timeout 10 squeue --me -h -o %A 2> /dev/null) || return 0
	for folder; do
		[[ -O $folder && ! -L $folder && -r $folder/job ]] || continue
		read -r cluster job < "$folder/job" || continue
		[[ $cluster == "${SLURM_CLUSTER_NAME:-}" && $'\n'$queue$'\n' != *$'\n'$job$'\n'* ]] || continue
		rm -rf "$folder"
		log "removed $folder, which job $job has left behind"
	done
}

make_scratch() { # a folder on this node for temporary files ($scratch), and a short one for Ray's sockets ($sockets)
	local folder
	remove_leftovers "${TMPDIR:-/tmp}"/ray-?????? /tmp/ray-??????
	scratch=$(mktemp -d "${TMPDIR:-/tmp}/ray-XXXXXX") || die "$1" "${TMPDIR:-/tmp} on $SLURMD_NODENAME cannot be written"
	sockets=$scratch
	((${#sockets} < 38)) || sockets=$(mktemp -d /tmp/ray-XXXXXX) # the paths of sockets may have at most 107 bytes
	for folder in "$scratch" "$sockets"; do echo "${SLURM_CLUSTER_NAME:-} $SLURM_JOB_ID" > "$folder/job"; done
}

address_of() { # [network interface]: prints its IPv4 address, or its IPv6 address if it has no other
	ip -o addr show dev "$1" scope global | awk '{split($4, a, "/"); print a[1]; exit}'
}
