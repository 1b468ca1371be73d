use super::super::journal::{Bounds, Journal, Line};
use super::*;
use crate::calendar::DAY_MS;

/// A table of `days` days with four calls each: of ann and bob, on endpoints a and b.
fn table(folder: &Path, days: u64) -> Vec<Segment> {
    let bounds = Bounds {
        segment_bytes_max: 700,
        bytes_max: 1 << 30,
        days_max: 10_000,
    };
    let mut journal = Journal::open(folder.to_owned(), bounds, &[], |_| {}).unwrap();
    for day in 1..=days {
        for (i, (user, endpoint)) in [("ann", "a"), ("ann", "b"), ("bob", "a"), ("bob", "b")]
            .into_iter()
            .enumerate()
        {
            let row = UsageRow {
                time_ms: day * DAY_MS + i as u64,
                user: user.into(),
                endpoint: endpoint.into(),
                endpoint_id: format!("id of {endpoint}"),
                outcome: "complete".into(),
                output_tokens: day,
                ..UsageRow::default()
            };
            let text = serde_json::to_vec(&row).unwrap();
            let time_ms = row.time_ms;
            journal.append(&[Line { time_ms, text }]).unwrap();
        }
    }
    journal.segments().to_vec()
}

#[test]
fn pages_follow_each_other_without_gap_or_repetition() {
    let folder = tempfile::tempdir().unwrap();
    let segments = table(folder.path(), 5);
    for rows_max in 1..=21 {
        let mut times = Vec::new();
        let mut from = None;
        loop {
            let page: Page<UsageRow> =
                page(folder.path(), &segments, &Filter::default(), from, rows_max).unwrap();
            assert!(page.rows.len() <= rows_max);
            times.extend(page.rows.iter().map(|row| row.time_ms));
            from = page
                .next
                .map(|next| Position::parse(&next.to_string()).unwrap());
            if from.is_none() {
                break;
            }
        }
        assert_eq!(times.len(), 20, "{rows_max} rows a page");
        assert!(times.is_sorted());
    }
}

#[test]
fn a_filter_takes_its_time_user_and_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let segments = table(folder.path(), 5);
    let count = |filter: Filter| {
        let page: Page<UsageRow> = page(folder.path(), &segments, &filter, None, 100).unwrap();
        page.rows.len()
    };
    let all = Filter::default;
    let table = [
        (all(), 20),
        (
            Filter {
                start_ms: 2 * DAY_MS,
                end_ms: Some(4 * DAY_MS),
                ..all()
            },
            8,
        ),
        (
            Filter {
                start_ms: 2 * DAY_MS + 1,
                end_ms: Some(2 * DAY_MS + 3),
                ..all()
            },
            2,
        ),
        (
            Filter {
                user: Some("ann".into()),
                ..all()
            },
            10,
        ),
        (
            Filter {
                user: Some("ann".into()),
                endpoint: Some("b".into()),
                ..all()
            },
            5,
        ),
        (
            Filter {
                endpoint: Some("b".into()),
                endpoint_id: Some("id of an earlier b".into()),
                ..all()
            },
            0,
        ),
        (
            Filter {
                user: Some("eve".into()),
                ..all()
            },
            0,
        ),
        (
            Filter {
                start_ms: 9 * DAY_MS,
                ..all()
            },
            0,
        ),
    ];
    for (filter, expected) in table {
        assert_eq!(count(filter.clone()), expected, "{filter:?}");
    }
}

#[test]
fn sums_are_made_by_any_keys_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let segments = table(folder.path(), 3);
    let by = |by: &[By]| sums(folder.path(), &segments, &Filter::default(), by).unwrap();
    let all = by(&[]);
    assert_eq!((all.len(), all[0].sums.calls), (1, 12));
    assert_eq!(all[0].sums.output_tokens, 4 * (1 + 2 + 3));
    let users = by(&[By::User]);
    assert_eq!(users[0].keys, ["ann"]);
    assert_eq!((users.len(), users[1].sums.calls), (2, 6));
    let days = by(&[By::Day, By::Endpoint]);
    assert_eq!(days.len(), 6);
    assert_eq!(days[5].keys, ["1970-01-04", "b"]);
    assert_eq!(days[5].sums.output_tokens, 6);
    let empty = Filter {
        user: Some("eve".into()),
        ..Filter::default()
    };
    assert!(
        sums(folder.path(), &segments, &empty, &[])
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_place_that_no_page_gave_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let segments = table(folder.path(), 1);
    let inside = Position {
        segment: segments[0].name,
        offset: 3,
    };
    let error = page::<UsageRow>(
        folder.path(),
        &segments,
        &Filter::default(),
        Some(inside),
        5,
    );
    let error = error.unwrap_err();
    assert!(
        matches!(&error, QueryError::Refused(why) if why.contains("page_token")),
        "{error}"
    );
}
