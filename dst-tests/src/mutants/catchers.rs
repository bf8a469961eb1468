//! Which clauses catch which bug.

use vm_planted_bugs::Bug;

/// Gives the clauses that are known to catch a bug, the quickest first. They are run first; others may catch it too.
#[must_use]
pub fn catchers(bug: Bug) -> &'static [&'static str] {
    match bug {
        Bug::IdsRepeat => &["lifecycle.ids_are_unique"],
        Bug::ConfigIsForgotten => &["lifecycle.config_is_kept"],
        Bug::HostIsNotAsked => &["config.each_bad_field_is_named", "config.limits_of_the_host"],
        Bug::FilesAreNotLookedAt => &["mounts.missing_directory", "config.missing_read_only_disk"],
        Bug::LargestIsRefused => &["config.limits_of_the_host", "config.good_ones_are_accepted"],
        Bug::UnclaimedIsTaken => &["honesty.root", "honesty.kernel"],
        Bug::StopTwiceFails => &["lifecycle.ends_are_idempotent"],
        Bug::WaitMissesTheEnd => &["lifecycle.wait_after_the_end"],
        Bug::WaitEndsInCreated => &["lifecycle.wait_in_created"],
        Bug::ReadyTooEarly => &["lifecycle.wait_ready_resolves"],
        Bug::ReadinessHasNoLimit => &["lifecycle.wait_ready_times_out"],
        Bug::CrashHasNoReason => &["events.crash_is_told"],
        Bug::OneReaderAtATime => &["events.every_reader_has_all"],
        Bug::EndedGuestIsAsked => &["concurrency.refused_after_the_end"],
        Bug::EndedMachineIsKept => &["leftovers.none_after_stop"],
        Bug::ReturnWithoutLoss => &["events.no_return_without_loss"],
        Bug::InspectionOfAnother => &["inspect.is_of_the_machine"],
        Bug::GuestPortIsShared => &["vsock.port_in_use"],
        Bug::CrashedCannotStart | Bug::ContentIsNotSynced => &["files.whole_after_vmm_death"],
        Bug::RestoreOverRunning | Bug::HashBeforeLastWrite => &["lifecycle.restore_in_table"],
        Bug::PauseOfPaused | Bug::PausedGuestIsAsked => &["pause.refuses_guest_operations"],
        Bug::StreamsOfPaused => &["vsock.running_alone"],
        Bug::InspectionOfRunning => &["lifecycle.refusals_change_nothing"],
        Bug::PausedIsNotCaptured => &["snapshot.restored_is_not_rebooted"],
        Bug::StopForgetsCrash => &["lifecycle.state_table"],
        Bug::StopOfCreated => &["lifecycle.random_walks"],
        Bug::RestoredPausedRuns | Bug::PausedCopyIsNotFresh => {
            &["snapshot.restore_paused_or_running"]
        }
        Bug::AbandonedBootCrashes => &["cancel.start"],
        Bug::CrashOfPausedIsMissed | Bug::PausesOutliveMachine => &["lifecycle.crash_of_paused"],
        Bug::PowerOffIsACrash => &["lifecycle.power_off_is_seen"],
        Bug::FailedReviveStaysStarting => &["snapshot.failed_load_in_place"],
        Bug::LateCancelIsMissed => &["cancel.start_as_it_succeeds"],
        Bug::RefusedStartIsUndone => &["cancel.refused_start"],
        Bug::StopWaitsItsTurn => &["lifecycle.ends_preempt_hanging_boot"],
        Bug::OneWaiterIsWoken => &["lifecycle.wait_wakes_all"],
        Bug::FirstExitIsKept => &["lifecycle.wait_tells_of_each_life"],
        Bug::CallForgetsMachine => &["errors.name_machine_and_operation"],
        Bug::StoppedBeforeGone => &["lifecycle.stopped_means_gone"],
        Bug::StopSendsItsOwnSignal => &["lifecycle.stop_sends_the_signal"],
        Bug::StopIgnoresGrace | Bug::ShutdownKillsAtOnce => &["lifecycle.stop_lets_clean_up"],
        Bug::StopGraceHasNoEnd => &["lifecycle.ignored_stop_ends"],
        Bug::DeadlineForgotten | Bug::ConsoleIsDropped => &["lifecycle.boot_hang_ends"],
        Bug::GoneCallerIsServed => &["cancel.hanging_start"],
        Bug::PausedIsNotSettled => &["pause.stuck_pause_ends"],
        Bug::UptimeIsKept => &["metrics.in_every_state"],
        Bug::BasesOutliveMachine => &["incremental.restored_in_place"],
        Bug::RestoredIsNotReseeded | Bug::ReseedDoesNothing => &["snapshot.restore_twice"],
        Bug::RestoredClockIsNotSet => &["snapshot.clock_right_after_restore"],
        Bug::ResumeForgetsClock => &["pause.clock_right_after_resume"],
        Bug::PausedTimeCounts => &["deadline.pauses_do_not_count"],
        Bug::FailedSaveLeavesPaused => &["incremental.after_failures"],
        Bug::ForkResumesPaused | Bug::ChildrenRunAtOnce => &["fork.of_paused"],
        Bug::OneFailedChildFailsAll => &["fork.partial_failure"],
        Bug::ForkIntoNone => &["fork.count_is_checked"],
        Bug::LabelIsForgotten => &["snapshot.metadata_is_right"],
        Bug::NewestBaseIsTaken | Bug::WriteCutsTheRest => &["incremental.changes_amid_a_file"],
        Bug::BaseIsNotLookedAt => &["incremental.replaced_base_is_refused"],
        Bug::MissedEventsAreNotTold => &["events.slow_reader_is_told"],
        Bug::EventsNeverEnd => &["lifecycle.last_handle_ends_machine"],
        Bug::AgentPortIsOpen => &["vsock.bad_ports"],
        Bug::DeletedIsKept => &["snapshot.deleted_is_gone"],
        Bug::ExitOvertakesOutput
        | Bug::LastOutputIsLost
        | Bug::SearchStopsEarly
        | Bug::FramesTogetherAreLost
        | Bug::OutputsAreSwapped => &["exec.streams_apart"],
        Bug::StderrCreditForgotten => &["exec.megabytes_on_stderr"],
        Bug::TimeoutLooksLikeSignal | Bug::TimeoutIsNotWatched => &["exec.timeout_kills_group"],
        Bug::OneByteOverLimit => &["exec.output_limit"],
        Bug::MachineEnvironmentWins => &["exec.environment_exact"],
        Bug::DetachIsForgotten | Bug::AttachBeginsAnew => &["process.detached_lives_on"],
        Bug::RepeatedOutputIsKept => {
            &["process.unread_output_over_broken_link", "process.broken_link_unseen"]
        }
        Bug::InputIsNotRepeated => &["process.broken_link_unseen"],
        Bug::EofIsNotRepeated => &["files.sizes"],
        Bug::CreditLeaks
        | Bug::InputEndsTooEarly
        | Bug::InputIsCountedShort
        | Bug::OffsetsWrap
        | Bug::FullPipeLosesBytes => &["exec.megabytes_both_ways"],
        Bug::RequestIsNotRepeated => &["exec.runs_once"],
        Bug::RequestRunsAgain => &["exec.runs_once", "files.sizes"],
        Bug::DroppedStaysOpen | Bug::DoomedLivesOn | Bug::KillMissesChildren => {
            &["exec.dropped_kills_group"]
        }
        Bug::DropWaitsForNextRequest => &["process.dropped_is_told_at_once"],
        Bug::InterruptedLooksLost => &["lifecycle.stop_ends_stubborn_programs"],
        Bug::RequestMayBeTooLarge => &["exec.request_too_large"],
        Bug::ReconnectsAreNotCounted => &["metrics.reconnects_are_counted"],
        Bug::ReturnIsNotTold => &["events.lost_agent_is_told"],
        Bug::FullDiskLooksLikeIo => &["files.full_disk"],
        Bug::TimeoutAsksPolitely => &["exec.timeout_defies_traps"],
        Bug::EndedIsForgotten | Bug::OldestOutputIsKept => &["process.detached_output_is_bounded"],
        Bug::ProcessIdIsReused => &["process.known_by_pid"],
        Bug::ElapsedIsUptime => &["exec.elapsed_time"],
        Bug::StreamOutlivesLoss => &["process.dropped_while_link_is_down"],
        Bug::SignalToEndedFails => &["process.signal_to_ended"],
        Bug::NameIsNotSynced => &["files.whole_after_panic"],
        Bug::TemporaryIsLeft => &["files.cancelled_write"],
        Bug::ModeIsReset => &["files.mode_is_kept"],
        Bug::LinkIsReplaced => &["files.write_through_link"],
        Bug::RemovalFollowsLinks => &["files.remove_kinds"],
        Bug::ListingIgnoresCase => &["files.listing_sorted"],
        Bug::ParentsAreNotMade => &["files.create_dir_recursive"],
        Bug::UserKeepsRootGroup => &["exec.user_by_name"],
        Bug::CreditIsIgnored | Bug::LongListsAreRefused => &["files.listing_large"],
        Bug::SectionIsNotHashed | Bug::ImageIsNotHashed | Bug::PaddingIsNotChecked => {
            &["integrity.flipped_bytes_refused"]
        }
        Bug::HeaderIsNotHashed => &["integrity.every_header_byte_counts"],
        Bug::ManifestIsNotHashed => &["incremental.bit_rot"],
        Bug::SnapshotIsNotSynced | Bug::SnapshotNameIsNotSynced => &["snapshot.torn_write"],
        Bug::HalfMadeFileIsLeft => &["snapshot.host_disk_full"],
        Bug::AnyBaseWillDo => &["incremental.needs_the_very_base"],
        Bug::ZerosDoNotCover | Bug::BaseIsNotCut => &["incremental.what_went_is_gone"],
        Bug::MergeKeepsId | Bug::MergeKeepsBase | Bug::MergeDropsLastPiece => {
            &["incremental.merged_needs_no_other"]
        }
        Bug::StatusOfAnother => &["exec.many_at_once"],
        Bug::StoppedStaysStopped => &["process.stopped_and_continued"],
        Bug::ResizeIsSilent => &["tty.resize_signals"],
        Bug::ClockRunsWhilePaused => &["pause.freezes_guest_time"],
        Bug::LoadedClockBeginsAnew => &["snapshot.sleep_goes_on"],
        Bug::CopyKeepsStreams => &["fork.bytes_in_flight"],
        Bug::PanicLooksLikePowerOff => &["lifecycle.panic_is_seen"],
        Bug::ConsoleHasNoBound => &["lifecycle.console_bounded"],
        Bug::ChangedPageIsMissed => &["incremental.restored_as_a_whole"],
        Bug::ChildSharesDisk => &["fork.childs_disk_goes_with_it"],
        Bug::SharedRootIsWritable => &["root.shared_read_only"],
        Bug::PortOutlivesMachine => &["network.ports_come_free"],
        Bug::PortLeadsAstray => &["network.ports_do_not_mix"],
        Bug::LonelyGuestReachesHost => &["network.none_reaches_nothing"],
        Bug::ChildrenTakePorts => &["network.fork_keeps_ports"],
        _ => &[],
    }
}
