//! Rows that are written come back, whatever is cut off behind them and wherever.

use proptest::prelude::*;

use super::*;

const WIDE: Bounds = Bounds {
    segment_bytes_max: 1 << 20,
    bytes_max: 1 << 30,
    days_max: 10_000,
};

/// Rows of these days are equally long.
const DAY_200: u64 = 200 * DAY_MS;

fn line(time_ms: u64, note: usize) -> Line {
    Line {
        time_ms,
        text: format!("{{\"time_ms\":{time_ms},\"note\":{note}}}").into_bytes(),
    }
}

fn open(folder: &Path, bounds: Bounds) -> Journal {
    Journal::open(folder.to_owned(), bounds, &[], |_| {}).unwrap()
}

fn rows(folder: &Path, journal: &Journal, from: Option<Position>) -> Vec<Vec<u8>> {
    let mut rows = Vec::new();
    read(folder, journal.segments(), from, |_, line| {
        rows.push(line.to_vec());
        ControlFlow::Continue(())
    })
    .unwrap();
    rows
}

fn files(folder: &Path) -> Vec<String> {
    names(folder)
        .unwrap()
        .iter()
        .map(SegmentName::to_string)
        .collect()
}

#[test]
fn segments_begin_with_days_and_when_they_are_full() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = line(DAY_200, 1).text.len() as u64 + 1;
    let bounds = Bounds {
        segment_bytes_max: 2 * bytes,
        ..WIDE
    };
    let mut journal = open(folder.path(), bounds);
    let next_day = DAY_200 + DAY_MS;
    let times = [DAY_200, DAY_200 + 1, DAY_200 + 2, next_day, DAY_200 + 3];
    let lines: Vec<Line> = times.iter().map(|time| line(*time, 1)).collect();
    assert!(journal.append(&lines).unwrap());
    // The last row's clock was set back: its segment is the newest all the same.
    let expected = ["1970-07-20.jsonl", "1970-07-20.2.jsonl", "1970-07-21.jsonl"];
    assert_eq!(files(folder.path()), expected);
    let texts: Vec<Vec<u8>> = lines.into_iter().map(|line| line.text).collect();
    assert_eq!(rows(folder.path(), &journal, None), texts);
    assert!(!open(folder.path(), bounds).append(&[]).unwrap());
}

#[test]
fn a_row_larger_than_a_segment_has_one_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        segment_bytes_max: 10,
        ..WIDE
    };
    let mut journal = open(folder.path(), bounds);
    journal.append(&[line(5, 1), line(5, 2)]).unwrap();
    assert_eq!(files(folder.path()).len(), 2);
    assert_eq!(rows(folder.path(), &journal, None).len(), 2);
}

#[test]
fn old_segments_go_whole_and_the_newest_stays() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = line(DAY_200, 1).text.len() as u64 + 1;
    let bounds = Bounds {
        bytes_max: 2 * bytes,
        ..WIDE
    };
    let mut journal = open(folder.path(), bounds);
    let day = |day: u64| DAY_200 + day * DAY_MS;
    let lines: Vec<Line> = (0..4).map(|i| line(day(i), 1)).collect();
    journal.append(&lines).unwrap();
    assert!(journal.retain(day(3)).unwrap());
    assert_eq!(
        files(folder.path()),
        ["1970-07-22.jsonl", "1970-07-23.jsonl"]
    );
    let mut journal = open(
        folder.path(),
        Bounds {
            days_max: 2,
            ..WIDE
        },
    );
    assert!(!journal.retain(day(4)).unwrap());
    assert!(journal.retain(day(5)).unwrap());
    assert_eq!(files(folder.path()), ["1970-07-23.jsonl"]);
    assert!(journal.retain(day(60)).unwrap());
    assert!(files(folder.path()).is_empty());
    journal.append(&[line(day(61), 1)]).unwrap();
    assert_eq!(rows(folder.path(), &journal, None).len(), 1);
}

#[test]
fn what_cannot_be_written_is_lost_and_told_and_what_follows_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("table");
    std::fs::write(&place, "a file where the folder goes").unwrap();
    let mut journal = Journal {
        folder: place.clone(),
        bounds: WIDE,
        segments: Vec::new(),
        current: None,
        spoiled: false,
        unsynced: false,
    };
    let loss = journal.append(&[line(1, 1), line(2, 2)]).unwrap_err();
    assert_eq!(loss.rows, 2);
    std::fs::remove_file(&place).unwrap();
    journal.append(&[line(3, 3)]).unwrap();
    assert_eq!(rows(&place, &journal, None), [line(3, 3).text]);
}

#[test]
fn a_segment_that_could_not_be_cut_takes_no_more_rows() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path(), WIDE);
    journal.append(&[line(1, 1)]).unwrap();
    journal.spoiled = true;
    journal.current = None;
    let torn = folder.path().join("1970-01-01.jsonl");
    let mut file = OpenOptions::new().append(true).open(&torn).unwrap();
    file.write_all(b"{\"time_ms\":1,\"no").unwrap();
    journal.append(&[line(2, 2)]).unwrap();
    let both = [line(1, 1).text, line(2, 2).text];
    assert_eq!(rows(folder.path(), &journal, None), both);
    let again = open(folder.path(), WIDE);
    assert_eq!(rows(folder.path(), &again, None), both);
}

#[test]
fn a_place_between_rows_is_where_reading_goes_on_and_any_other_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path(), WIDE);
    let lines: Vec<Line> = (1..=3).map(|i| line(i * DAY_MS, 1)).collect();
    journal.append(&lines).unwrap();
    let mut places = Vec::new();
    read(folder.path(), journal.segments(), None, |behind, _| {
        places.push(behind);
        ControlFlow::Continue(())
    })
    .unwrap();
    for (i, place) in places.iter().enumerate() {
        assert_eq!(rows(folder.path(), &journal, Some(*place)).len(), 2 - i);
    }
    let inside = Position {
        offset: places[0].offset - 1,
        ..places[0]
    };
    let error = read(folder.path(), journal.segments(), Some(inside), |_, _| {
        ControlFlow::Continue(())
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
    let far = Position {
        offset: u64::MAX,
        ..places[2]
    };
    assert!(rows(folder.path(), &journal, Some(far)).is_empty());
}

#[test]
fn rows_that_an_index_knows_are_not_visited_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path(), WIDE);
    journal.append(&[line(1, 1), line(2, 2)]).unwrap();
    let known = journal.segments().to_vec();
    journal.append(&[line(3, 3)]).unwrap();
    let mut visited = Vec::new();
    let again = Journal::open(folder.path().to_owned(), WIDE, &known, |line| {
        visited.push(line.to_vec());
    })
    .unwrap();
    assert_eq!(visited, [line(3, 3).text]);
    assert_eq!(again.segments(), journal.segments());
    // Shorter than it was known to be: read again, and not counted again.
    let file = OpenOptions::new()
        .write(true)
        .open(folder.path().join("1970-01-01.jsonl"))
        .unwrap();
    file.set_len(known[0].bytes - 1).unwrap();
    let shorter = Journal::open(folder.path().to_owned(), WIDE, &known, |_| {
        panic!("counted twice")
    })
    .unwrap();
    assert_eq!(shorter.segments()[0].rows, 1);
}

proptest! {
    /// Kills cut the newest segment anywhere; lives follow each other.
    #[test]
    fn whole_rows_survive_any_number_of_kills_at_any_byte(
        lives in prop::collection::vec((prop::collection::vec(0..4 * DAY_MS, 1..6), 0u64..200, any::<bool>()), 1..6),
        segment_bytes_max in 20u64..200,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let bounds = Bounds { segment_bytes_max, ..WIDE };
        let mut expected: Vec<Vec<u8>> = Vec::new();
        let mut note = 0;
        let mut known = Vec::new();
        let mut counted = 0;
        for (times, cut, keep_index) in lives {
            let mut journal = Journal::open(folder.path().to_owned(), bounds, &known, |_| counted += 1).unwrap();
            let found = rows(folder.path(), &journal, None);
            prop_assert_eq!(&found, &expected);
            for time in times {
                note += 1;
                journal.append(&[line(time, note)]).unwrap();
                counted += 1;
                expected.push(line(time, note).text);
            }
            known = if keep_index { journal.segments().to_vec() } else { Vec::new() };
            if !keep_index {
                counted = 0;
            }
            drop(journal);
            // The kill: the newest file loses its last bytes, or has more that mean nothing.
            let newest = names(folder.path()).unwrap().pop().unwrap();
            let path = folder.path().join(newest.to_string());
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            let length = file.metadata().unwrap().len();
            if keep_index {
                file.write_all(b"{\"time_ms\":7,\"torn").unwrap();
            } else {
                let cut = cut.min(length);
                file.set_len(length - cut).unwrap();
                let mut gone = 0;
                let mut left = length;
                while left > length - cut {
                    gone += 1;
                    left -= expected[expected.len() - gone].len() as u64 + 1;
                }
                expected.truncate(expected.len() - gone);
            }
        }
        let journal = Journal::open(folder.path().to_owned(), bounds, &known, |_| counted += 1).unwrap();
        prop_assert_eq!(&rows(folder.path(), &journal, None), &expected);
        prop_assert_eq!(counted, expected.len());
        let indexed: u64 = journal.segments().iter().map(|segment| segment.rows).sum();
        prop_assert_eq!(indexed as usize, expected.len());
    }
}
