//! The catalogue.

/// Where a bug was planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Area {
    /// The state function of `vm-trait`.
    State,
    /// Lifecycle, capture and streams of `vm-core`.
    Core,
    /// The agent's client in `vm-core`.
    Client,
    /// The agent core.
    Agent,
    /// The frames between the two.
    Protocol,
    /// The snapshot container, its images, chains and merges.
    Container,
    /// The simulator.
    Simulator,
}

impl Area {
    /// Names the area as reports do.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Core => "core",
            Self::Client => "client",
            Self::Agent => "agent",
            Self::Protocol => "protocol",
            Self::Container => "container",
            Self::Simulator => "simulator",
        }
    }
}

macro_rules! bugs {
    ($($area:ident { $($bug:ident = $name:literal: $sentence:literal,)* })*) => {
        /// One mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Bug {
            $($(#[doc = $sentence] $bug,)*)*
        }

        impl Bug {
            /// Lists every bug, in a fixed order.
            pub const ALL: &'static [Self] = &[$($(Self::$bug,)*)*];

            /// Names the bug as commands and reports do, in kebab case.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $($(Self::$bug => $name,)*)* }
            }

            /// Says in one sentence what is wrong.
            #[must_use]
            pub fn sentence(self) -> &'static str {
                match self { $($(Self::$bug => $sentence,)*)* }
            }

            /// Gives where it was planted.
            #[must_use]
            pub fn area(self) -> Area {
                match self { $($(Self::$bug => Area::$area,)*)* }
            }
        }
    };
}

bugs! {
    State {
        CrashedCannotStart = "crashed-cannot-start":
            "A machine that crashed cannot be started again.",
        RestoreOverRunning = "restore-over-running":
            "A restore in place is admitted over a machine that runs.",
        PauseOfPaused = "pause-of-paused":
            "A machine that is paused can be paused once more.",
        StreamsOfPaused = "streams-of-paused":
            "Streams to a paused machine are admitted.",
        InspectionOfRunning = "inspection-of-running":
            "A machine that runs is admitted to inspection.",
        PausedIsNotCaptured = "paused-is-not-captured":
            "A snapshot of a paused machine is refused.",
        PausedGuestIsAsked = "paused-guest-is-asked":
            "Operations on programs and files are admitted while the machine is paused.",
        StopForgetsCrash = "stop-forgets-crash":
            "A stop makes a crashed machine Stopped, and its reason is lost.",
        StopOfCreated = "stop-of-created":
            "A stop makes a machine Stopped that was never started.",
        RestoredPausedRuns = "restored-paused-runs":
            "A machine that was restored to stand still says that it runs.",
        AbandonedBootCrashes = "abandoned-boot-crashes":
            "A boot that its caller gave up leaves the machine Crashed.",
        CrashOfPausedIsMissed = "crash-of-paused-is-missed":
            "The end of a paused machine does not change its state.",
        PowerOffIsACrash = "power-off-is-a-crash":
            "A guest that powers off by itself makes the machine Crashed.",
    }
    Core {
        IdsRepeat = "ids-repeat":
            "Every machine has the same id.",
        ConfigIsForgotten = "config-is-forgotten":
            "A machine says that it has the default configuration.",
        HostIsNotAsked = "host-is-not-asked":
            "A configuration is not held to what the host can do, nor looked through.",
        FilesAreNotLookedAt = "files-are-not-looked-at":
            "The host's files that a configuration names are not looked at before the start.",
        LargestIsRefused = "largest-is-refused":
            "A machine as large as the host allows is refused.",
        UnclaimedIsTaken = "unclaimed-is-taken":
            "A configuration may ask for what the backend does not claim.",
        StopTwiceFails = "stop-twice-fails":
            "A stop or kill of a machine that has ended is refused.",
        WaitMissesTheEnd = "wait-misses-the-end":
            "A wait that begins after the end waits for the next one.",
        WaitEndsInCreated = "wait-ends-in-created":
            "A wait for a machine that was never started is over at once.",
        ReadyTooEarly = "ready-too-early":
            "A machine that is starting is taken for one that is ready.",
        ReadinessHasNoLimit = "readiness-has-no-limit":
            "A wait for a machine to be ready never gives up.",
        CrashHasNoReason = "crash-has-no-reason":
            "Every crash is told as a boot that failed.",
        OneReaderAtATime = "one-reader-at-a-time":
            "A new reader of events takes the place of the one before.",
        EndedGuestIsAsked = "ended-guest-is-asked":
            "Operations on programs and files are admitted in every state.",
        InspectionOfAnother = "inspection-of-another":
            "An inspection shows a machine without processors.",
        FailedReviveStaysStarting = "failed-revive-stays-starting":
            "After a restore that failed the state stays Starting for ever.",
        LateCancelIsMissed = "late-cancel-is-missed":
            "A start whose caller leaves just when it is done is not undone.",
        RefusedStartIsUndone = "refused-start-is-undone":
            "A refused start whose caller leaves ends the machine that an earlier one brought up.",
        StopWaitsItsTurn = "stop-waits-its-turn":
            "A stop or kill does not cut short what the machine is doing.",
        OneWaiterIsWoken = "one-waiter-is-woken":
            "Of those who wait for a change of state only the first is woken.",
        FirstExitIsKept = "first-exit-is-kept":
            "How a machine ended is noted for its first life only.",
        CallForgetsMachine = "call-forgets-machine":
            "The error of an operation does not say on which machine it was.",
        StoppedBeforeGone = "stopped-before-gone":
            "A stop says Stopped before the guest is gone.",
        StopSendsItsOwnSignal = "stop-sends-its-own-signal":
            "A stop sends SIGTERM whatever signal was asked for.",
        StopIgnoresGrace = "stop-ignores-grace":
            "A stop gives the guest no time to clean up.",
        StopGraceHasNoEnd = "stop-grace-has-no-end":
            "A stop waits for the guest for ever.",
        DeadlineForgotten = "deadline-forgotten":
            "What the machine does for its owner has no deadline.",
        GoneCallerIsServed = "gone-caller-is-served":
            "A boot goes on though its caller has left.",
        PausedIsNotSettled = "paused-is-not-settled":
            "After a failed pause or resume a machine that stands still is said to run.",
        UptimeIsKept = "uptime-is-kept":
            "The uptime of a machine that has ended goes on counting.",
        BasesOutliveMachine = "bases-outlive-machine":
            "What changed since a snapshot is believed to be known in the next life too.",
        ConsoleIsDropped = "console-is-dropped":
            "The console is gone with its machine.",
        PausesOutliveMachine = "pauses-outlive-machine":
            "The time paused is that of all lives.",
        RestoredIsNotReseeded = "restored-is-not-reseeded":
            "A restored guest goes on with the random pool that was captured.",
        RestoredClockIsNotSet = "restored-clock-is-not-set":
            "A restored guest keeps the time of day at which it was captured.",
        PausedCopyIsNotFresh = "paused-copy-is-not-fresh":
            "A guest that was restored or forked paused is not reseeded when it is resumed.",
        ResumeForgetsClock = "resume-forgets-clock":
            "A resume leaves the guest with the time of day at which it was paused.",
        PausedTimeCounts = "paused-time-counts":
            "The time paused counts against the deadlines of requests.",
        FailedSaveLeavesPaused = "failed-save-leaves-paused":
            "A snapshot that fails leaves the machine paused.",
        ForkResumesPaused = "fork-resumes-paused":
            "A fork of a paused machine lets it run.",
        OneFailedChildFailsAll = "one-failed-child-fails-all":
            "A fork of which one child fails fails as a whole.",
        ForkIntoNone = "fork-into-none":
            "A fork into no child at all is carried out.",
        ChildrenRunAtOnce = "children-run-at-once":
            "The children of a paused machine run.",
        LabelIsForgotten = "label-is-forgotten":
            "A snapshot does not keep its label.",
        NewestBaseIsTaken = "newest-base-is-taken":
            "An incremental snapshot holds what changed since the newest snapshot, not since its base.",
        BaseIsNotLookedAt = "base-is-not-looked-at":
            "A snapshot is taken on a base whose file is no longer what it was.",
        MissedEventsAreNotTold = "missed-events-are-not-told":
            "A reader of events that is too slow is not told that it missed some.",
        EventsNeverEnd = "events-never-end":
            "The events of a machine do not end with it.",
        AgentPortIsOpen = "agent-port-is-open":
            "A stream can be opened to the port of the agent.",
        DeletedIsKept = "deleted-is-kept":
            "A snapshot that is deleted stays on the host.",
    }
    Client {
        ExitOvertakesOutput = "exit-overtakes-output":
            "Output that has arrived is lost when the end of its program is known.",
        StderrCreditForgotten = "stderr-credit-forgotten":
            "The guest is never told that room for standard error came free.",
        TimeoutLooksLikeSignal = "timeout-looks-like-signal":
            "A program that was ended by its time limit is reported as killed by a signal.",
        OneByteOverLimit = "one-byte-over-limit":
            "One byte more of the output is kept than was asked for.",
        MachineEnvironmentWins = "machine-environment-wins":
            "The machine's environment goes before that of the request.",
        DetachIsForgotten = "detach-is-forgotten":
            "A program that was detached is killed with its handle all the same.",
        RepeatedOutputIsKept = "repeated-output-is-kept":
            "Bytes that the guest sends again after a loss are given to the reader twice.",
        InputIsNotRepeated = "input-is-not-repeated":
            "Input that was under way when the link broke is not sent again.",
        EofIsNotRepeated = "eof-is-not-repeated":
            "The end of input that was under way when the link broke is not sent again.",
        CreditLeaks = "credit-leaks":
            "Of each large piece of output that was read only a part is given back as room.",
        RequestIsNotRepeated = "request-is-not-repeated":
            "A request that was under way when the link broke is not sent again.",
        DroppedStaysOpen = "dropped-stays-open":
            "Dropping a request does not tell the guest.",
        DropWaitsForNextRequest = "drop-waits-for-next-request":
            "Dropping a request tells the guest only along with the next one.",
        InterruptedLooksLost = "interrupted-looks-lost":
            "What a stop cuts short fails as Disconnected.",
        RequestMayBeTooLarge = "request-may-be-too-large":
            "A request that no frame can hold is not refused.",
        ReconnectsAreNotCounted = "reconnects-are-not-counted":
            "Connections to the agent that were made anew are not counted.",
        ReturnWithoutLoss = "return-without-loss":
            "The return of the connection is told also where its loss was not, because the machine was stopping.",
        ReturnIsNotTold = "return-is-not-told":
            "Nobody is told that the connection to the agent is back.",
        FullDiskLooksLikeIo = "full-disk-looks-like-io":
            "A full disk of the guest is told as an I/O error.",
    }
    Agent {
        TimeoutAsksPolitely = "timeout-asks-politely":
            "A time limit sends a signal that a program may ignore.",
        TimeoutIsNotWatched = "timeout-is-not-watched":
            "The agent does not wake up for the time limit of a program.",
        LastOutputIsLost = "last-output-is-lost":
            "What a program wrote just before its end is not read.",
        InputEndsTooEarly = "input-ends-too-early":
            "Standard input is closed before what waits for the program was written.",
        EndedIsForgotten = "ended-is-forgotten":
            "A detached program that has ended is not remembered.",
        ProcessIdIsReused = "process-id-is-reused":
            "The id of a process that was forgotten is given to the next one.",
        DoomedLivesOn = "doomed-lives-on":
            "The program of a stream that was closed is not killed.",
        ElapsedIsUptime = "elapsed-is-uptime":
            "The time that a program took is told as the guest's uptime.",
        StreamOutlivesLoss = "stream-outlives-loss":
            "A stream that was closed while the link was down stays open in the guest.",
        RequestRunsAgain = "request-runs-again":
            "A request that is repeated after a loss is carried out again.",
        ReseedDoesNothing = "reseed-does-nothing":
            "The agent answers that it reseeded the guest and does not.",
        SignalToEndedFails = "signal-to-ended-fails":
            "A signal to a program that has ended is an error.",
        ShutdownKillsAtOnce = "shutdown-kills-at-once":
            "The agent kills all programs at once when it is asked to power off.",
        ContentIsNotSynced = "content-is-not-synced":
            "A file is put in place before its content is durable.",
        NameIsNotSynced = "name-is-not-synced":
            "A file is said to be written before its name is durable.",
        TemporaryIsLeft = "temporary-is-left":
            "A write that fails leaves its temporary file.",
        ModeIsReset = "mode-is-reset":
            "Replacing a file resets its permission bits.",
        LinkIsReplaced = "link-is-replaced":
            "Writing to a symbolic link replaces the link.",
        RemovalFollowsLinks = "removal-follows-links":
            "Removing a symbolic link looks at what it points to.",
        ListingIgnoresCase = "listing-ignores-case":
            "A directory is listed in the order of its names without regard to case.",
        ParentsAreNotMade = "parents-are-not-made":
            "Making a directory with its parents makes only the last of them.",
        SearchStopsEarly = "search-stops-early":
            "A program is looked for in the first directory of PATH only.",
        UserKeepsRootGroup = "user-keeps-root-group":
            "A program of a user by name runs with the group of root.",
        OldestOutputIsKept = "oldest-output-is-kept":
            "Of the output of a detached program that nobody reads the newest is dropped.",
        AttachBeginsAnew = "attach-begins-anew":
            "Who takes up a program gets all output that is kept, not that from the offset asked for.",
        CreditIsIgnored = "credit-is-ignored":
            "Output is sent beyond what the host has room for.",
        InputIsCountedShort = "input-is-counted-short":
            "Of each piece of input that a program took only half is counted.",
    }
    Protocol {
        FramesTogetherAreLost = "frames-together-are-lost":
            "Of frames that arrive together only the first is taken.",
        OutputsAreSwapped = "outputs-are-swapped":
            "Standard output and standard error are taken for each other.",
        LongListsAreRefused = "long-lists-are-refused":
            "A list is refused that is longer than what room is made for at first.",
        OffsetsWrap = "offsets-wrap":
            "Offsets are sent as 16 bits.",
    }
    Container {
        HashBeforeLastWrite = "hash-before-last-write":
            "The hash of a section is taken before its last bytes are in it.",
        SectionIsNotHashed = "section-is-not-hashed":
            "The hash of a section is not compared when it is read.",
        ImageIsNotHashed = "image-is-not-hashed":
            "The hash of memory is not compared when it is read.",
        HeaderIsNotHashed = "header-is-not-hashed":
            "The hash of the header is not compared.",
        ManifestIsNotHashed = "manifest-is-not-hashed":
            "The hash of the manifest is not compared.",
        PaddingIsNotChecked = "padding-is-not-checked":
            "The bytes between sections may be anything.",
        SnapshotIsNotSynced = "snapshot-is-not-synced":
            "A snapshot gets its name before its content is durable.",
        SnapshotNameIsNotSynced = "snapshot-name-is-not-synced":
            "A snapshot is said to be taken before its name is durable.",
        HalfMadeFileIsLeft = "half-made-file-is-left":
            "A snapshot that fails leaves its temporary file.",
        AnyBaseWillDo = "any-base-will-do":
            "A base that was replaced by another snapshot is taken for the right one.",
        ZerosDoNotCover = "zeros-do-not-cover":
            "Pages that became zero keep what they held in the base.",
        BaseIsNotCut = "base-is-not-cut":
            "What a base held behind the present end of an image is still there.",
        MergeKeepsId = "merge-keeps-id":
            "A merged snapshot has the id of the one that it was made of.",
        MergeKeepsBase = "merge-keeps-base":
            "A merged snapshot still names the base that it no longer needs.",
        MergeDropsLastPiece = "merge-drops-last-piece":
            "A merge forgets the last piece of each image.",
    }
    Simulator {
        KillMissesChildren = "kill-misses-children":
            "A kill of a process group reaches its leader alone.",
        StatusOfAnother = "status-of-another":
            "The agent is told the exit status of whichever process ended last.",
        StoppedStaysStopped = "stopped-stays-stopped":
            "A program that was stopped by a signal does not go on when it is continued.",
        ResizeIsSilent = "resize-is-silent":
            "A program is not told that its terminal was resized.",
        FullPipeLosesBytes = "full-pipe-loses-bytes":
            "A pipe that is nearly full says that it took more bytes than it did.",
        WriteCutsTheRest = "write-cuts-the-rest":
            "A write amid a file cuts off what stands behind it.",
        ClockRunsWhilePaused = "clock-runs-while-paused":
            "The guest's clock counts the time that it is paused.",
        LoadedClockBeginsAnew = "loaded-clock-begins-anew":
            "A restored guest's monotonic clock begins at zero.",
        CopyKeepsStreams = "copy-keeps-streams":
            "A copy of a machine keeps the streams of the original.",
        PanicLooksLikePowerOff = "panic-looks-like-power-off":
            "A guest that panics is taken for one that powered off.",
        ConsoleHasNoBound = "console-has-no-bound":
            "The console keeps everything.",
        ChangedPageIsMissed = "changed-page-is-missed":
            "An incremental snapshot misses the last page that changed.",
        ChildSharesDisk = "child-shares-disk":
            "A fork's child writes its disks to the host's files.",
        EndedMachineIsKept = "ended-machine-is-kept":
            "A machine that has ended keeps its place on the host.",
        GuestPortIsShared = "guest-port-is-shared":
            "A second listener on a port of the same machine takes the place of the first.",
        SharedRootIsWritable = "shared-root-is-writable":
            "A read-only root that is a directory of the host can be written to.",
        PortOutlivesMachine = "port-outlives-machine":
            "The mapped ports of a machine that has ended stay taken.",
        PortLeadsAstray = "port-leads-astray":
            "Every mapped port leads to where the first one does.",
        LonelyGuestReachesHost = "lonely-guest-reaches-host":
            "A guest without a network reaches the loopback services of its host.",
        ChildrenTakePorts = "children-take-ports":
            "The mapped ports lead to the newest copy of a machine, and not to the machine.",
    }
}
