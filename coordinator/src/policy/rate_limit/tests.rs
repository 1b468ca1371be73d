use proptest::prelude::*;

use super::*;

fn limit(on: Limited, calls: Option<u64>, tokens: Option<u64>) -> RateLimit {
    RateLimit { on, calls, tokens }
}

fn group(name: &str) -> Limited {
    Limited::One(Grantee::Group(name.into()))
}

fn user(name: &str) -> Limited {
    Limited::One(Grantee::User(name.into()))
}

/// Lets calls in until one is refused: how many came in, and why not the next.
fn until_refused(
    windows: &mut Windows,
    limits: &[RateLimit],
    caller: &Caller,
    now_ms: u64,
) -> (usize, Refused) {
    let limits: Vec<&RateLimit> = limits.iter().collect();
    for taken in 0..1000 {
        if let Err(refused) = windows.admit(&limits, caller, now_ms) {
            return (taken, refused);
        }
    }
    panic!("nothing is limited");
}

#[test]
fn each_user_has_its_own_calls_and_all_share_the_endpoints() {
    let limits = [
        limit(Limited::EachUser, Some(3), None),
        limit(Limited::Endpoint, Some(5), None),
    ];
    let (ann, bob) = (Caller::user("ann", &[]), Caller::user("bob", &[]));
    let mut windows = Windows::default();
    let (taken, refused) = until_refused(&mut windows, &limits, &ann, 0);
    assert_eq!((taken, refused.share), (3, Share::User("ann".into())));
    let (taken, refused) = until_refused(&mut windows, &limits, &bob, 0);
    assert_eq!((taken, &refused.share), (2, &Share::Endpoint));
    assert_eq!((refused.limit, refused.unit), (5, "calls"));
}

#[test]
fn the_most_special_limit_that_means_the_caller_holds_alone() {
    let limits = [
        limit(Limited::EachUser, Some(1), None),
        limit(group("team"), Some(2), None),
        limit(group("other"), Some(3), None),
        limit(user("ann"), Some(4), None),
    ];
    let table = [
        (Caller::user("eve", &[]), 1),
        (Caller::user("tim", &["team"]), 2),
        // By the first group, and then by the second.
        (Caller::user("two", &["other", "team"]), 3),
        (Caller::user("ann", &["team", "other"]), 4),
        // The members of a group share its limit.
        (Caller::user("tom", &["team"]), 0),
    ];
    let mut windows = Windows::default();
    for (caller, expected) in table {
        let (taken, _) = until_refused(&mut windows, &limits, &caller, 0);
        assert_eq!(taken, expected, "{caller:?}");
    }
}

#[test]
fn tokens_that_were_used_keep_the_next_call_out_until_they_are_a_minute_old() {
    let limits = [limit(Limited::EachUser, None, Some(100))];
    let limits: Vec<&RateLimit> = limits.iter().collect();
    let ann = Caller::user("ann", &[]);
    let mut windows = Windows::default();
    let shares = windows.admit(&limits, &ann, 500).unwrap();
    windows.charge(&shares, 60, 900);
    let again = windows.admit(&limits, &ann, 1_000).unwrap();
    windows.charge(&again, 200, 10_000);
    let refused = windows.admit(&limits, &ann, 30_000).unwrap_err();
    assert_eq!((refused.limit, refused.unit), (100, "tokens"));
    // The 200 of second 10 are a minute old when second 70 is over.
    assert_eq!(refused.wait_s, Some(41));
    assert!(windows.admit(&limits, &ann, 70_999).is_err());
    assert!(windows.admit(&limits, &ann, 71_000).is_ok());
}

#[test]
fn a_limit_of_nothing_lets_nobody_in_ever() {
    for limits in [
        [limit(Limited::Endpoint, Some(0), None)],
        [limit(Limited::EachUser, None, Some(0))],
    ] {
        let ann = Caller::user("ann", &[]);
        let (taken, refused) = until_refused(&mut Windows::default(), &limits, &ann, 0);
        assert_eq!((taken, refused.wait_s), (0, None));
    }
}

#[test]
fn a_changed_limit_counts_what_was_used_before() {
    let ann = Caller::user("ann", &[]);
    let mut windows = Windows::default();
    let before = [limit(Limited::EachUser, Some(5), None)];
    assert_eq!(until_refused(&mut windows, &before, &ann, 0).0, 5);
    let more = [limit(Limited::EachUser, Some(7), None)];
    assert_eq!(until_refused(&mut windows, &more, &ann, 1_000).0, 2);
    let fewer = [limit(Limited::EachUser, Some(1), None)];
    let (taken, refused) = until_refused(&mut windows, &fewer, &ann, 2_000);
    assert_eq!((taken, refused.wait_s), (0, Some(60)));
}

#[test]
fn who_has_used_nothing_for_a_minute_is_forgotten() {
    let limits = [limit(Limited::EachUser, Some(5), None)];
    let limits: Vec<&RateLimit> = limits.iter().collect();
    let mut windows = Windows::default();
    for i in 0..1000_u64 {
        let caller = Caller::user(&i.to_string(), &[]);
        windows.admit(&limits, &caller, i * 1_000).unwrap();
        assert!(windows.used.len() <= 62, "{} are known", windows.used.len());
    }
}

proptest! {
    /// Against the plain list of all calls that came in.
    #[test]
    fn in_no_minute_more_calls_come_in_than_the_limit_and_the_wait_is_true(
        pauses_ms in proptest::collection::vec(0u64..9_000, 1..120), most in 1u64..8,
    ) {
        let limits = [limit(Limited::Endpoint, Some(most), None)];
        let limits: Vec<&RateLimit> = limits.iter().collect();
        let ann = Caller::user("ann", &[]);
        let (mut windows, mut taken, mut now_ms) = (Windows::default(), Vec::new(), 0);
        for pause_ms in pauses_ms {
            now_ms += pause_ms;
            match windows.admit(&limits, &ann, now_ms) {
                Ok(_) => taken.push(now_ms),
                Err(refused) => {
                    let within = |window_ms: u64| taken.iter().filter(|&&at| at + window_ms > now_ms).count() as u64;
                    prop_assert!(within(61_000) >= most, "refused although {} of {most} were used", within(61_000));
                    let wait_s = refused.wait_s.unwrap();
                    prop_assert!((1..=61).contains(&wait_s));
                    // Whoever comes back then comes in.
                    now_ms += wait_s * 1000;
                    prop_assert!(windows.admit(&limits, &ann, now_ms).is_ok(), "the wait of {wait_s} s was too short");
                    taken.push(now_ms);
                }
            }
            for (i, from) in taken.iter().enumerate() {
                let minute = taken[i..].iter().filter(|&&at| at < from + 60_000).count() as u64;
                prop_assert!(minute <= most, "{minute} of {most} in the minute from {from}");
            }
        }
    }

    #[test]
    fn windows_stay_small_and_their_sum_is_that_of_their_cells(
        steps in proptest::collection::vec((0u64..3_000, 0u64..1_000), 1..300),
    ) {
        let (mut window, mut now_ms) = (Window::default(), 0);
        for (pause_ms, amount) in steps {
            now_ms += pause_ms;
            window.forget(now_ms);
            window.add(amount, now_ms);
            prop_assert!(window.cells.len() <= 62);
            prop_assert_eq!(window.sum, window.cells.iter().map(|cell| cell.1).sum::<u64>());
        }
    }
}
