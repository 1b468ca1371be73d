//! What becomes of a group, from what was seen of it: pure decisions.

use std::time::{Duration, Instant};

use nccl_rs::{Error, ResultCode};

use crate::collective::CollectiveError;

/// A rank and its group's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) rank: u32,
    pub(super) ranks: u32,
}

/// Work that is on its way through the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flight {
    pub(super) since: Instant,
    /// How long it may take.
    pub(super) wait_max: Duration,
}

/// What one look at a group has seen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Signs {
    /// This rank was told to end.
    pub(super) aborted: bool,
    /// A call of this rank failed, with this as its reason.
    pub(super) failed: Option<CollectiveError>,
    /// A rank whose connection has ended.
    pub(super) lost: Option<CollectiveError>,
    /// What NCCL reports.
    pub(super) nccl: Result<(), Error>,
    /// The oldest work in flight.
    pub(super) flight: Option<Flight>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// Look again.
    Wait,
    /// End the group for this reason.
    End(CollectiveError),
}

/// Decides, the surest sign first. While nothing is in flight a lost rank is left to the next call: the connections are read
/// in order there, and a clean end comes before a closed connection.
pub(super) fn watch(now: Instant, place: Place, signs: Signs) -> Verdict {
    let Signs {
        aborted,
        failed,
        lost,
        nccl,
        flight,
    } = signs;
    if let Some(failed) = failed {
        return Verdict::End(failed);
    }
    if aborted {
        return Verdict::End(CollectiveError::Aborted);
    }
    if let (Some(lost), Some(_)) = (&lost, flight) {
        return Verdict::End(lost.clone());
    }
    // A communicator that is closed cleanly is no sign.
    if let Err(error) = nccl.or_else(|error| {
        if error == Error::Ended {
            Ok(())
        } else {
            Err(error)
        }
    }) {
        return Verdict::End(lost.unwrap_or_else(|| reason(place, &error)));
    }
    match flight {
        Some(Flight { since, wait_max }) if now.saturating_duration_since(since) >= wait_max => {
            let silence = format!(
                "a step's collectives did not end within {} s",
                wait_max.as_secs_f32()
            );
            Verdict::End(suspect(place, &silence))
        }
        _ => Verdict::Wait,
    }
}

/// What NCCL's error means for the group, when no connection tells who is lost.
pub(super) fn reason(place: Place, error: &Error) -> CollectiveError {
    match error {
        Error::Failed {
            code: ResultCode::Remote,
            ..
        }
        | Error::TimedOut { .. } => suspect(place, &error.to_string()),
        Error::Ended => CollectiveError::Aborted,
        error => CollectiveError::Failed(error.to_string()),
    }
}

/// A loss that nobody has a name for. In a group of two it is the other rank.
fn suspect(Place { rank, ranks }: Place, what: &str) -> CollectiveError {
    let next = (rank + 1) % ranks;
    let reason = if ranks == 2 {
        what.to_owned()
    } else {
        format!("{what}; it may also be a rank other than {rank} and {next}")
    };
    CollectiveError::RankLost {
        rank: next,
        ranks,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLACE: Place = Place { rank: 1, ranks: 2 };

    fn lost(rank: u32) -> CollectiveError {
        CollectiveError::RankLost {
            rank,
            ranks: 2,
            reason: "it closed its connection".into(),
        }
    }

    fn nccl_error(code: ResultCode) -> Error {
        Error::Failed {
            call: "ncclAllReduce",
            code,
            words: "words".into(),
        }
    }

    fn quiet() -> Signs {
        Signs {
            aborted: false,
            failed: None,
            lost: None,
            nccl: Ok(()),
            flight: None,
        }
    }

    fn flying(since: Instant) -> Option<Flight> {
        Some(Flight {
            since,
            wait_max: Duration::from_secs(60),
        })
    }

    #[test]
    fn a_lost_rank_ends_a_step_in_flight_and_leaves_an_idle_group_to_its_next_call() {
        let now = Instant::now();
        let mut signs = Signs {
            lost: Some(lost(0)),
            ..quiet()
        };
        assert_eq!(watch(now, PLACE, signs.clone()), Verdict::Wait);
        signs.flight = flying(now);
        assert_eq!(watch(now, PLACE, signs), Verdict::End(lost(0)));
    }

    #[test]
    fn a_step_that_is_late_makes_the_other_rank_lost() {
        let begun = Instant::now();
        let signs = Signs {
            flight: flying(begun),
            ..quiet()
        };
        let after = |seconds| watch(begun + Duration::from_secs(seconds), PLACE, signs.clone());
        assert_eq!(after(59), Verdict::Wait);
        assert_eq!(
            after(60),
            Verdict::End(CollectiveError::RankLost {
                rank: 0,
                ranks: 2,
                reason: "a step's collectives did not end within 60 s".into()
            })
        );
    }

    #[test]
    fn a_remote_error_is_a_lost_rank_with_the_name_that_the_connections_give() {
        let now = Instant::now();
        let mut signs = Signs {
            nccl: Err(nccl_error(ResultCode::Remote)),
            ..quiet()
        };
        let Verdict::End(CollectiveError::RankLost {
            rank: 0, reason, ..
        }) = watch(now, PLACE, signs.clone())
        else {
            panic!("not a loss");
        };
        assert_eq!(reason, "ncclAllReduce failed: ncclRemoteError (words)");
        signs.lost = Some(lost(0));
        assert_eq!(watch(now, PLACE, signs), Verdict::End(lost(0)));
    }

    #[test]
    fn an_error_of_this_device_is_this_ranks_own() {
        let signs = Signs {
            nccl: Err(nccl_error(ResultCode::UnhandledCuda)),
            flight: flying(Instant::now()),
            ..quiet()
        };
        assert!(matches!(
            watch(Instant::now(), PLACE, signs),
            Verdict::End(CollectiveError::Failed(what)) if what.contains("ncclUnhandledCudaError")
        ));
    }

    #[test]
    fn in_a_larger_group_a_guess_says_that_it_is_one() {
        let place = Place { rank: 3, ranks: 4 };
        let error = Error::TimedOut {
            call: "ncclGroupEnd",
            waited: Duration::from_secs(30),
        };
        assert_eq!(
            reason(place, &error).to_string(),
            "rank 0 of 4 is lost: ncclGroupEnd was still in progress after 30 s; it may also be a rank other than 3 and 0"
        );
    }

    /// Any signs that one look may see at `now`, of a group of up to 8.
    fn any_look() -> impl Strategy<Value = (Place, Duration, Signs)> {
        let nccl = prop_oneof![
            4 => Just(Ok(())),
            1 => Just(Err(nccl_error(ResultCode::Remote))),
            1 => Just(Err(nccl_error(ResultCode::Internal))),
            1 => Just(Err(Error::Ended)),
        ];
        let place =
            (2..9u32).prop_flat_map(|ranks| (0..ranks).prop_map(move |rank| Place { rank, ranks }));
        let signs = (
            any::<bool>(),
            any::<bool>(),
            any::<bool>(),
            nccl,
            any::<bool>(),
        );
        (place, 0..120_000u64, signs).prop_map(
            |(place, ms, (aborted, failed, is_lost, nccl, flies))| {
                let signs = Signs {
                    aborted,
                    failed: failed.then(|| CollectiveError::Failed("first".into())),
                    lost: is_lost.then(|| lost((place.rank + 1) % place.ranks)),
                    nccl,
                    flight: if flies { flying(Instant::now()) } else { None },
                };
                (place, Duration::from_millis(ms), signs)
            },
        )
    }

    proptest! {
        #[test]
        fn a_group_ends_for_a_reason_stays_ended_and_names_no_rank_of_its_own(
            (place, later, signs) in any_look()
        ) {
            let begun = signs.flight.map_or_else(Instant::now, |flight| flight.since);
            let verdict = watch(begun, place, signs.clone());
            let nothing = !signs.aborted
                && signs.failed.is_none()
                && matches!(signs.nccl, Ok(()) | Err(Error::Ended))
                && (signs.lost.is_none() || signs.flight.is_none());
            prop_assert_eq!(verdict == Verdict::Wait, nothing, "{:?}", signs);
            let then = watch(begun + later, place, signs.clone());
            if verdict != Verdict::Wait {
                prop_assert_eq!(&then, &verdict);
            }
            let overdue = signs.flight.is_some_and(|flight| later >= flight.wait_max);
            if verdict == Verdict::Wait {
                prop_assert_eq!(then != Verdict::Wait, overdue);
            }
            if let Verdict::End(CollectiveError::RankLost { rank, ranks, .. }) = then {
                prop_assert!(rank != place.rank && (ranks == place.ranks || signs.lost.is_some()));
            }
        }
    }
}
