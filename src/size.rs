//! Numbers of bytes, as people write and read them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Units and the power of 1024 that each stands for. Those of 1000 (`MB`) are not among them: few who write them mean them.
const UNITS: [(&str, u32); 5] = [("K", 1), ("M", 2), ("G", 3), ("T", 4), ("P", 5)];

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It has another form.
    #[error("a size is a whole number of bytes, or of K, M, G, T (KiB, MiB, GiB, TiB): 512M")]
    Form,
    /// It is larger than any file can be.
    #[error("a size has less than 8 EiB")]
    TooLarge,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at_checked(digits).ok_or(SizeError::Form)?;
        if number.is_empty() {
            return Err(SizeError::Form);
        }
        let power = match unit.strip_suffix("iB").unwrap_or(unit) {
            "" if unit.is_empty() => 0,
            letter => UNITS.iter().find(|(name, _)| *name == letter).ok_or(SizeError::Form)?.1,
        };
        let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
        let bytes = number.checked_mul(1024_u64.pow(power)).ok_or(SizeError::TooLarge)?;
        // The kernel's own numbers have a sign.
        if i64::try_from(bytes).is_err() { Err(SizeError::TooLarge) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Size {
    /// Exactly, in bytes, and in the largest unit that leaves nothing over.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)?;
        let whole = |(_, power): &&(&str, u32)| self.0 > 0 && self.0.is_multiple_of(1024_u64.pow(*power));
        match UNITS.iter().rev().find(whole) {
            Some((unit, power)) => write!(f, " ({} {unit}iB)", self.0 / 1024_u64.pow(*power)),
            None => Ok(()),
        }
    }
}

/// A number of bytes as a reader wants it at a glance: to a tenth of the largest unit that it has one of.
#[derive(Clone, Copy, Debug)]
pub struct Rough(pub u64);

impl fmt::Display for Rough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((unit, power)) = UNITS.iter().rev().find(|(_, power)| self.0 >= 1024_u64.pow(*power)) else {
            return write!(f, "{} bytes", self.0);
        };
        // Rounded down: a file of this size is never said to be larger than it is.
        let tenths = u128::from(self.0) * 10 / u128::from(1024_u64.pow(*power));
        write!(f, "{}.{} {unit}iB", tenths / 10, tenths % 10)
    }
}

/// A size, or a share of something that has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// A number of bytes.
    Size(Size),
    /// Hundredths.
    Percent(u8),
}

impl Share {
    /// How many bytes that is of `whole`.
    pub fn of(self, whole: u64) -> u64 {
        match self {
            Self::Size(Size(bytes)) => bytes,
            // In this order nothing overflows; what is lost is less than 100 bytes.
            Self::Percent(percent) => whole / 100 * u64::from(percent),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(Size(bytes)) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Why a text is no share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// It is no share of a whole.
    #[error("a share is from 1% to 100%")]
    Percent,
    /// It is no size.
    #[error("{0}, or a share: 50%")]
    Size(#[from] SizeError),
}

impl FromStr for Share {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        match text.strip_suffix('%') {
            None => Ok(Self::Size(text.parse()?)),
            Some(number) => match number.parse() {
                Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
                _ => Err(ShareError::Percent),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let cases = [
            ("0", Ok(0)),
            ("4096", Ok(4096)),
            ("512M", Ok(512 << 20)),
            ("2GiB", Ok(2 << 30)),
            ("1K", Ok(1024)),
            ("3TiB", Ok(3 << 40)),
            ("7P", Ok(7 << 50)),
            ("", Err(SizeError::Form)),
            ("M", Err(SizeError::Form)),
            ("1.5G", Err(SizeError::Form)),
            ("-1", Err(SizeError::Form)),
            ("5 M", Err(SizeError::Form)),
            ("5MB", Err(SizeError::Form)),
            ("5iB", Err(SizeError::Form)),
            ("5m", Err(SizeError::Form)),
            ("1é", Err(SizeError::Form)),
            ("9000P", Err(SizeError::TooLarge)),
            ("9223372036854775808", Err(SizeError::TooLarge)),
            ("99999999999999999999", Err(SizeError::TooLarge)),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), expected.map(Size), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        let cases = [
            (0, "0 bytes"),
            (1000, "1000 bytes"),
            (1536, "1536 bytes"),
            (512 << 20, "536870912 bytes (512 MiB)"),
            (1 << 40, "1099511627776 bytes (1 TiB)"),
        ];
        for (bytes, text) in cases {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn shares_are_of_something() {
        assert_eq!("50%".parse::<Share>().map(|share| share.of(1000)), Ok(500));
        assert_eq!("64M".parse::<Share>().map(|share| share.of(1000)), Ok(64 << 20));
        assert_eq!("100%".parse::<Share>().map(|share| share.of(u64::MAX)), Ok(u64::MAX / 100 * 100));
        for text in ["0%", "101%", "%", "5.5%"] {
            assert_eq!(text.parse::<Share>(), Err(ShareError::Percent), "{text}");
        }
        assert!(matches!("x".parse::<Share>(), Err(ShareError::Size(_))));
    }
}
