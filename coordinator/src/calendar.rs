//! Days and moments in UTC, as file names, log lines and query parameters write them.
//!
//! Pure arithmetic on milliseconds since 1970; knows no clock and no time zone.

use std::fmt;

/// Milliseconds in a day.
pub const DAY_MS: u64 = 86_400_000;

/// A day, counted from 1970-01-01.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Day(pub u32);

impl Day {
    /// Latest day that is read: the end of the year 9999.
    const MAX: u32 = 2_932_896;

    /// The day of a moment.
    pub fn of_ms(ms: u64) -> Day {
        Day(u32::try_from(ms / DAY_MS).unwrap_or(Day::MAX).min(Day::MAX))
    }

    /// Its first millisecond.
    pub fn start_ms(self) -> u64 {
        u64::from(self.0) * DAY_MS
    }

    /// Reads `YYYY-MM-DD`.
    pub fn parse(text: &str) -> Option<Day> {
        let bytes = text.as_bytes();
        if bytes.len() != 10 || bytes[4] != b'-' || bytes[7] != b'-' {
            return None;
        }
        let (year, month, day) = (
            digits(&text[..4])?,
            digits(&text[5..7])?,
            digits(&text[8..])?,
        );
        let day = Day::from_civil(year, month, day)?;
        // 31 February is none: it would come back as another day.
        (day.to_string() == text).then_some(day)
    }

    /// Days since 1970 of a date of the Gregorian calendar; years are counted from March, which puts the leap day last.
    fn from_civil(year: u32, month: u32, day: u32) -> Option<Day> {
        if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day)
        {
            return None;
        }
        let year = if month <= 2 { year - 1 } else { year };
        let (era, of_era) = (year / 400, year % 400);
        let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let of_era = of_era * 365 + of_era / 4 - of_era / 100 + of_year;
        (era * 146_097 + of_era).checked_sub(719_468).map(Day)
    }

    fn civil(self) -> (u32, u32, u32) {
        let days = self.0 + 719_468;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + u32::from(month <= 2);
        (year, month, day)
    }
}

/// `YYYY-MM-DD`.
impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

/// A moment as `YYYY-MM-DDTHH:MM:SS.mmmZ`.
pub struct Moment(pub u64);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ms, seconds) = (self.0 % 1000, self.0 % DAY_MS / 1000);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let day = Day::of_ms(self.0);
        write!(f, "{day}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
    }
}

/// Reads a moment: milliseconds since 1970, `YYYY-MM-DD` (its first millisecond), or
/// `YYYY-MM-DDTHH:MM:SS[.mmm]Z`.
pub fn parse_moment(text: &str) -> Option<u64> {
    if !text.is_empty() && text.len() <= 15 && text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok();
    }
    if !text.is_ascii() || text.len() < 10 {
        return None;
    }
    let (date, time) = text.split_at(10);
    let start_ms = Day::parse(date)?.start_ms();
    if time.is_empty() {
        return Some(start_ms);
    }
    let time = time.strip_prefix(['T', 't', ' '])?;
    let time = time
        .strip_suffix(['Z', 'z'])
        .or_else(|| time.strip_suffix("+00:00"))?;
    let (clock, ms) = match time.split_once('.') {
        Some((clock, fraction)) if (1..=9).contains(&fraction.len()) => {
            digits(fraction)?;
            let padded = format!("{fraction:0<3}");
            (clock, digits(&padded[..3])?)
        }
        Some(_) => return None,
        None => (time, 0),
    };
    let parts: Vec<&str> = clock.split(':').collect();
    let [hour, minute, second] = parts[..] else {
        return None;
    };
    if [hour, minute, second].iter().any(|part| part.len() != 2) {
        return None;
    }
    let (hour, minute, second) = (digits(hour)?, digits(minute)?, digits(second)?);
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let seconds = hour * 3600 + minute * 60 + second;
    Some(start_ms + u64::from(seconds) * 1000 + u64::from(ms))
}

fn digits(text: &str) -> Option<u32> {
    let all = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if all { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn moments_read_as_people_write_them() {
        assert_eq!(Moment(0).to_string(), "1970-01-01T00:00:00.000Z");
        assert_eq!(
            Moment(1_710_327_769_123).to_string(),
            "2024-03-13T11:02:49.123Z"
        );
        for (text, expected) in [
            ("1710327769123", Some(1_710_327_769_123)),
            ("2024-03-13", Some(1_710_288_000_000)),
            ("2024-03-13T11:02:49Z", Some(1_710_327_769_000)),
            ("2024-03-13T11:02:49.1Z", Some(1_710_327_769_100)),
            ("2024-03-13T11:02:49.123456+00:00", Some(1_710_327_769_123)),
            ("2024-02-29", Some(1_709_164_800_000)),
            ("2023-02-29", None),
            ("2024-13-01", None),
            ("1969-12-31", None),
            ("2024-03-13T25:00:00Z", None),
            ("2024-03-13T11:02:49", None),
            ("2024-03-13T11:2:49Z", None),
            ("2024-03-13T11:02:49.Z", None),
            ("yesterday", None),
            ("", None),
            ("-5", None),
            ("é024-03-13", None),
        ] {
            assert_eq!(parse_moment(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_day_comes_back_and_days_are_in_order(day in 0..Day::MAX) {
            let (day, next) = (Day(day), Day(day + 1));
            prop_assert_eq!(Day::parse(&day.to_string()), Some(day));
            prop_assert!(day.to_string() < next.to_string());
            prop_assert_eq!(Day::of_ms(day.start_ms()), day);
        }

        #[test]
        fn every_moment_comes_back(ms in 0..Day(Day::MAX).start_ms()) {
            prop_assert_eq!(parse_moment(&Moment(ms).to_string()), Some(ms));
        }

        #[test]
        fn no_text_breaks_the_reader(text in ".{0,40}") {
            parse_moment(&text);
        }
    }
}
