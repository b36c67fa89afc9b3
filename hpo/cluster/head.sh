# What head_node.slurm asks of Slurm, and what it does with its workers. It sources this file after slurm.sh.

workers=() # ids of the worker jobs
declare -A local_workers=() # process ids of the workers in this job, by node
declare -A has_answered=() # workers that have joined, or have said why they cannot
declare -A last_reason=() # why each worker job waits, as the log has it
declare -A gone=() # worker jobs that have left the queue
restarts=0 joined=0 # numbers of workers
refused='' broken='' # last sentence of workers that refused, and of those whose node cannot be used
refusing='' # the nodes of both
unshared=0 # number of nodes that do not see the results folder
next_report=0 # when report_on_workers says again why workers wait
retry_until=0 # until this time a rejected sbatch is repeated; 0: the last sbatch has succeeded

# -- what Slurm says, and what is asked of it ------------------------------------------------------------------------

slurm_is_busy() { [[ $answer == *'imed out'* || $answer == *'nable to contact'* || $answer == *emporarily* ]]; }

seconds() { # [[days-]hours:minutes:seconds]: prints it in seconds; prints nothing for UNLIMITED
	local days=0 rest=$1 parts part sum=0
	[[ $rest =~ ^([0-9]+-)?[0-9:]+$ ]] || return 0
	if [[ $rest == *-* ]]; then days=${rest%%-*} rest=${rest#*-}; fi
	IFS=: read -ra parts <<< "$rest"
	for part in "${parts[@]}"; do sum=$((sum * 60 + 10#$part)); done
	echo $((days * 86400 + sum))
}

read_gpu_request() { # sets $request, the option of sbatch for GPUs, and from it $GPUS_PER_NODE and $gpu_type
	[[ ${GPUS_PER_NODE-} != 0 ]] || GPU_REQUEST='' # no GPUs, whatever cluster.env says
	request=${GPU_REQUEST:---gpus-per-node=${GPUS_PER_NODE-}} gpu_type=''
	# --gpus-per-node=[type:]number, -G[type:]number, or --gres=gpu[:type][:number], among others
	if [[ $request =~ (gpu[a-z-]*[:=]|^-G *)(([^:,=]+):)?([0-9]+)([,\(]|$) ]]; then
		gpu_type=${BASH_REMATCH[3]} GPUS_PER_NODE=${BASH_REMATCH[4]}
	elif [[ $request =~ gres=(.*,)?gpu(:[^:,]*[^0-9:,][^:,]*)?(,|$) ]]; then
		GPUS_PER_NODE=1
	fi # else, as with --gres=shard:4, it is as given
}

set_exclude() { # sets $exclude, for worker jobs: this node, the head's --exclude, and that of WORKER_OPTIONS
	local i option
	exclude=$node${excluded:+,$excluded}
	for ((i = 0; i < ${#WORKER_OPTIONS[@]}; i++)); do
		case ${WORKER_OPTIONS[i]} in
		-x | --exclude) exclude+=,${WORKER_OPTIONS[i + 1]-} ;;
		-x* | --exclude=*) option=${WORKER_OPTIONS[i]#--exclude=} exclude+=,${option#-x} ;;
		esac
	done
}

in_queue() { # prints the worker jobs that are still in the queue; fails if Slurm does not answer
	local jobs worker
	jobs=$(my_jobs) || return 1
	for worker in "${workers[@]}"; do if has_line "$jobs" "$worker"; then echo "$worker"; fi; done
}

wait_for_workers() { # [seconds]: waits until the worker jobs have left the queue; fails after this time
	local left end=$((SECONDS + $1))
	while ((SECONDS < end)); do
		if left=$(in_queue) && [[ ! $left ]]; then return 0; fi
		sleep 0.5
	done
	return 1
}

requeue() { # has Slurm queue this job again; while Slurm is busy, tries until a minute before the time limit
	until answer=$(timeout 30 scontrol requeue "$SLURM_JOB_ID" 2>&1); do
		if { [[ ! $answer ]] || slurm_is_busy; } && ((SECONDS < time_limit - 60)); then sleep 5 && continue; fi
		log "Slurm has not requeued the job: ${answer:-no answer}. $how_to_resume"
		break
	done
}

in_words() { # [Slurm's reason why a job waits]
	case $1 in
	Resources) echo 'no node with what it asks for is free' ;;
	Priority) echo 'other jobs come first' ;;
	ReqNodeNotAvail* | Nodes?required*) echo 'nodes that it could use are down, drained or reserved within its time' ;;
	ReservationDeleted* | ReservationInvalid* | Reservation*deleted) echo 'its reservation is gone' ;;
	Reservation*) echo 'its reservation has not begun, or its nodes are in use' ;;
	QOSMin* | QOS*PerJob* | QOS*PerNode* | Assoc*PerJob* | Assoc*PerNode*) echo 'one job may not ask for this' ;;
	InvalidQOS | InvalidAccount | QOSNotAllowed | AccountNotAllowed) echo 'its QOS or account may not be used here' ;;
	QOS*) echo 'a limit of its QOS is reached; the head job counts too' ;;
	Assoc* | Max*PerAccount) echo 'a limit of the account or the user is reached; the head job counts too' ;;
	MaxMemPerLimit) echo 'it asks for more memory than the site allows (MEM_PER_NODE)' ;;
	BeginTime | Dependency*) echo 'it waits for the time or the job that its options name' ;;
	PartitionDown | PartitionInactive) echo 'its partition is down or inactive' ;;
	Partition*) echo 'it asks for more than the partition allows (WORKER_TIME, WORKER_PARTITION)' ;;
	BadConstraints | Constraints) echo 'no node has what it asks for' ;;
	Licenses) echo 'its licences are in use; the head job holds some too' ;;
	JobHeld* | JobHoldMaxRequeue) echo 'it is held' ;;
	*) echo 'see "job reason codes" in the manual of squeue, and https://slurm.schedmd.com/resource_limits.html' ;;
	esac
}

log_waiting() { # why worker jobs wait in the queue: again when the reason changes
	local worker state reason
	local -A waiting=()
	while read -r worker state reason; do
		[[ " ${workers[*]} " == *" $worker "* && $reason != None ]] || continue
		[[ $state != @(RUNNING|CONFIGURING|COMPLETING|SUSPENDED) ]] || continue
		[[ ${last_reason[$worker]-} != "${reason%%:*}" ]] || continue # without the nodes that are listed behind
		last_reason[$worker]=${reason%%:*} waiting[$reason]+=" $worker"
	done < <(timeout 10 squeue --all --me -h -o '%A %T %r' 2> /dev/null)
	for reason in "${!waiting[@]}"; do
		log "waiting in the queue:${waiting[$reason]} ($reason: $(in_words "$reason"))"
	done
}

start_script() { # [arguments of raytune_bayesian.py]: sets $script
	(
		umask "$users_umask"
		export RENDEZVOUS_DIR=$rendezvous SBATCH_TIMELIMIT=$limit # of the head job; for the plan of --check
		exec setsid "${container[@]}" python raytune_bayesian.py "$@"
	) &
	script=$!
}

# -- workers are started ---------------------------------------------------------------------------------------------

users_environment() { # in a subshell: that of the submission
	local name
	for name in "$@"; do unset "$name"; done
	if [[ $users_tmpdir ]]; then TMPDIR=$users_tmpdir; else unset TMPDIR; fi
}

submit() ( # prints the new job's id
	account=${WORKER_ACCOUNT:-${SLURM_JOB_ACCOUNT-}}
	partition=$SLURM_JOB_PARTITION
	if [[ ,${SBATCH_PARTITION-}, == *",$partition,"* ]]; then partition=$SBATCH_PARTITION; fi # one of several
	partition=${WORKER_PARTITION:-$partition}
	conf=${SLURM_CONF-}
	# These describe the head job, or belong to it alone. The user's other SBATCH_* are for the worker jobs too.
	users_environment "${!SLURM_@}" SBATCH_JOB_NAME SBATCH_OUTPUT SBATCH_ERROR SBATCH_SIGNAL SBATCH_WAIT
	[[ ! $WORKER_PARTITION ]] || unset SBATCH_QOS SBATCH_CONSTRAINT
	[[ ! $conf ]] || export SLURM_CONF=$conf
	# --spread-job: where worker jobs take a part of a node, Slurm fills one node first without it
	options=(--parsable --export=ALL --spread-job --partition="$partition" --cpus-per-task="$CPUS_PER_NODE")
	[[ ! ${MEM_PER_NODE-} || " ${WORKER_OPTIONS[*]}" == *' --mem-per-'* ]] \
		|| options+=(--mem="$MEM_PER_NODE") # sbatch takes one of them
	((GPUS_PER_NODE == 0)) || [[ $request == none ]] || options+=("$request")
	[[ ! $account ]] || options+=(--account="$account")
	[[ ! $WORKER_CONSTRAINT ]] || options+=(--constraint="$WORKER_CONSTRAINT")
	[[ ! $WORKER_TIME ]] || options+=(--time="$WORKER_TIME")
	[[ ! $qos || $WORKER_PARTITION ]] || options+=(--qos="$qos")
	[[ ! $reservation ]] || options+=(--reservation="$reservation")
	[[ ! $licences ]] || options+=(--licenses="$licences")
	options+=("${WORKER_OPTIONS[@]}" --exclude="$exclude")
	id=$(sbatch "${options[@]}" worker_node.slurm "$rendezvous" 2> "$scratch/sbatch") || return 1
	# with several clusters it is id;cluster, and a site may print more before and after it
	grep -oE '^[0-9]+(;|\s*$)' <<< "$id" | tail -n 1 | tr -cd '0-9' || true
)

add_worker() { # submits a worker job; if it fails, $answer has Slurm's message
	answer=''
	if workers+=("$(submit)"); then # one command: no signal can come between the job and its id
		if [[ ! ${workers[-1]} ]]; then
			unset 'workers[-1]'
			die 1 "sbatch has printed no job id; a job of yours may be left in the queue"
		fi
		echo "${workers[*]}" > "$rendezvous/workers"
	else
		unset 'workers[-1]'
		answer=$(tr '\n' ' ' < "$scratch/sbatch")
		return 1
	fi
}

submit_workers() { # [number]: the first worker jobs. While Slurm is busy each is tried for a minute, then the job ends
	local i end
	for ((i = 0; i < $1; i++)); do
		end=$((SECONDS + 60))
		until add_worker; do
			((SECONDS < end)) && slurm_is_busy || die 2 "no worker job can be submitted from $node: $answer. \
See WORKER_PARTITION and GPU_REQUEST in cluster.env; NUM_WORKERS=0 or --nodes needs no worker jobs"
			sleep 2
		done
	done
}

start_local_worker() { # [node of this job]
	local options command=(bash worker_node.slurm "$rendezvous" "$1" "$node" "$(readlink "/proc/$$/fd/1")")
	local of_job=(RAY_ADDRESS) # variables that the worker does not get
	local memory=("${!SLURM_MEM_PER_@}")
	if ((${#memory[@]} > 1)); then # srun takes one. Others are left of a job in which sbatch was called
		case $this_job in
		*MinMemoryCPU=*) memory=("${memory[@]/SLURM_MEM_PER_CPU/}") ;;
		*MemPerTres=*) memory=("${memory[@]/SLURM_MEM_PER_GPU/}") ;;
		*) memory=("${memory[@]/SLURM_MEM_PER_NODE/}") ;;
		esac
		of_job+=(${memory[@]})
	fi
	if [[ $1 != "$node" ]]; then
		options=(--nodelist="$1" --nodes=1 --ntasks=1 --export=ALL --overlap --cpu-bind=none --mpi=none)
		((!gpus)) || [[ $request == none ]] || options+=(--gpus-per-node="$gpus")
		command=(srun "${options[@]}" "${command[@]}")
		# srun would take these for the step; they are what the whole job has asked for
		of_job+=("${!SLURM_GPUS@}" "${!SLURM_NTASKS@}" SLURM_GRES SLURM_TRES_PER_TASK SLURM_EXPORT_ENV)
		of_job+=(SLURM_THREADS_PER_CORE SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_EXACT)
	fi
	(users_environment "${of_job[@]}" && exec setsid "${command[@]}") \
		< /dev/null &>> "logs/ray_worker_bloom_bohb-$SLURM_JOB_ID-$1.out" &
	local_workers[$1]=$!
	disown # otherwise bash prints how it ended
}

# -- and watched, and replaced ----------------------------------------------------------------------------------------

read_answers() { # a worker writes in $rendezvous that it has joined, or why it cannot
	local file worker what word rest
	for file in "$rendezvous"/worker-*; do
		[[ -s $file ]] || continue
		word='' rest='' # if the file cannot be opened, they stay so
		read -r word rest < "$file" || [[ $word ]] || continue
		worker=${file#"$rendezvous"/worker-}
		[[ " ${own_nodes[*]} " == *" $worker "* ]] && what="on $worker" || what="job $worker"
		# Slurm may have taken a job although sbatch has failed:
		if [[ " ${own_nodes[*]} ${workers[*]} " != *" $worker "* && ! ${gone[$worker]-} ]]; then
			workers+=("$worker")
			echo "${workers[*]}" > "$rendezvous/workers"
		fi
		case $word in
		broken) log "worker $what has a broken GPU on $rest" ;;
		unfit) log "worker $what cannot use $rest" ;;
		*) log "worker $what $word $rest" ;;
		esac
		rm "$file"
		has_answered[$worker]=1
		case $word in
		joined) joined=$((joined + 1)) ;;
		failed) echo "$rest" >> "$rendezvous/refused" ;; # for --check
		refused | broken | unfit) # it would fail again on this node; what is refused would be so on other nodes, too
			[[ $word == refused ]] && refused=$rest || broken=$rest
			exclude+=,${rest%%:*} refusing+=" ${rest%%:*}"
			echo "$rest" >> "$rendezvous/refused"
			;;
		esac
	done
}

report_on_workers() { # what they have answered, and every 15 s why some wait in the queue
	read_answers
	((SECONDS >= next_report)) || return 0
	next_report=$((SECONDS + 15))
	log_waiting
}

note_for_check() { # [worker] [node or job] [what is wrong]: for the table of --check, where the worker has said nothing
	if [[ ! ${has_answered[$1]-} ]]; then echo "$2: $3" >> "$rendezvous/refused"; fi
}

replace_lost() { # replaces worker jobs that have left the queue, at most MAX_WORKER_RESTARTS in all
	local left worker why ended place kept=()
	left=$(in_queue) || return 0
	for worker in "${workers[@]}"; do
		if has_line "$left" "$worker" || [[ -e $rendezvous/worker-$worker ]]; then kept+=("$worker") && continue; fi
		gone[$worker]=1
		if [[ -e $rendezvous/release-$worker ]]; then # the search gave it back
			jobs=$((jobs - 1))
			continue
		fi
		log "worker job $worker has ended"
		why='it ended before it joined: see its log in logs/'
		ended=$(timeout 10 scontrol show job "$worker" 2>&1) || true
		[[ $ended =~ [[:space:]]NodeList=([^[:space:]\(]+) ]] && place=${BASH_REMATCH[1]} || place=''
		if [[ $ended == *ExitCode=3:0* ]]; then
			why="$results is not shared: the node of that job does not see it"
			[[ $place && " $refusing " == *" $place "* ]] || unshared=$((unshared + 1))
			((unshared > 1)) && refused=$why || broken=$why # a second node will tell
		fi
		if [[ $place && ! ${has_answered[$worker]-} && $ended == *JobState=FAILED* ]]; then # so would the next one
			exclude+=,$place refusing+=" $place"
		fi
		# one that has worked until WORKER_TIME, or until Slurm preempted it, is no failure, and is not counted
		[[ ! ${has_answered[$worker]-} || $ended != *JobState=@(TIMEOUT|PREEMPTED)* ]] || restarts=$((restarts - 1))
		note_for_check "$worker" "worker job $worker" "$why"
	done
	workers=("${kept[@]}")
	((joined)) || [[ ! $refused ]] || return 0 # it would be the same on other nodes
	while ((${#workers[@]} < jobs && restarts < MAX_WORKER_RESTARTS)); do
		if ! add_worker; then
			[[ $joined != 0 || ! $refusing || ${#workers[@]} != 0 || $answer != *'not available'* ]] || no_worker_left
			if ((!retry_until)); then
				retry_until=$((SECONDS + WORKER_TIMEOUT))
				log "no new worker job can be submitted now, will try again: $answer"
			fi
			return 0
		fi
		retry_until=0
		restarts=$((restarts + 1))
		log "worker job ${workers[-1]} replaces it ($restarts of at most $MAX_WORKER_RESTARTS)"
	done
}

restart_local() { # starts workers of this job again that have ended, unless their node is lost or has refused
	local each of_job
	for each in "${!local_workers[@]}"; do
		if kill -0 "${local_workers[$each]}" 2> /dev/null || [[ -e $rendezvous/worker-$each ]]; then continue; fi
		of_job=$(timeout 10 squeue --all -h -o %N -j "$SLURM_JOB_ID" 2> /dev/null) || return 0 # looks again later
		of_job=$(scontrol show hostnames "$of_job")
		log "the worker on $each has ended"
		note_for_check "$each" "$each" "its worker ended before it joined: see its log in logs/"
		unset "local_workers[$each]"
		[[ " $refusing " != *" $each "* ]] && has_line "$of_job" "$each" || continue
		((restarts < MAX_WORKER_RESTARTS)) || continue
		restarts=$((restarts + 1))
		start_local_worker "$each"
		log "another one is started there ($restarts of at most $MAX_WORKER_RESTARTS)"
	done
}

no_worker_left() { # ends the job
	((joined == 0)) || die 1 "no worker is left; $restarts of at most $MAX_WORKER_RESTARTS were started again \
(MAX_WORKER_RESTARTS). What was saved is in $results. $how_to_resume"
	[[ ! $refused$broken ]] || die 2 "all workers ended before they joined: ${refused:-$broken}"
	die 1 "all workers ended before they joined: see logs/ray_worker_bloom_bohb-*"
}

look_after_workers() { # replaces those that have ended; if none is left, the job ends
	replace_lost
	restart_local
	((${#workers[@]} + ${#local_workers[@]} + checking || SECONDS < retry_until)) || no_worker_left
}
