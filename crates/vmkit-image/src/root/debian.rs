//! `debian`: a minimal system of this machine's distribution and release, from this machine's own package sources.
//!
//! No mirror is named here. What apt uses on this machine is what the image is made of and what apt in a guest will use.

use std::fs;
use std::path::{Path, PathBuf};

use vmkit::{Error, ErrorKind, Result};

use super::ext4::EPOCH;
use crate::progress::Phase;
use crate::run::{Tool, Work};

/// Makes the root file system's tar.
pub(super) fn make(work: &Work<'_>, tar: &Path) -> Result<()> {
    work.report(Phase::Root, "asking mmdebstrap for a minimal system");
    let codename = codename(&fs::read_to_string("/etc/os-release").unwrap_or_default())
        .ok_or_else(|| unsupported("this system's release has no code name"))?;
    let sources = Sources::read(Path::new("/etc/apt"), &codename);
    if sources.deb822.is_empty() && sources.lines.is_empty() {
        return Err(unsupported(&format!("apt has no source for {codename}")));
    }
    let mut tool =
        Tool::new("mmdebstrap", "mmdebstrap").needs("tar", "tar").args(&["--variant=minbase", "--format=tar"]);
    // mmdebstrap copies this machine's name and resolver; a guest has its own.
    for (file, text) in [
        ("hostname", "vmkit\\n"),
        ("hosts", "127.0.0.1 localhost vmkit\\n::1 localhost ip6-localhost ip6-loopback\\n"),
        ("resolv.conf", "nameserver 10.0.2.3\\n"),
        ("machine-id", ""),
    ] {
        tool = tool.arg(format!(r#"--customize-hook=printf '{text}' >"$1/etc/{file}""#));
    }
    tool = tool.arg(&codename).arg(tar);
    for (name, text) in [("sources.sources", &sources.deb822), ("sources.list", &sources.lines)] {
        if !text.is_empty() {
            let path = work.path(name);
            let failed = |error| Error::io(format!("{} cannot be written", path.display()), error);
            fs::write(&path, text).map_err(failed)?;
            tool = tool.arg(&path);
        }
    }
    if rustix::process::geteuid().is_root() {
        // An ordinary user's mmdebstrap works under other ids, to whom the store is closed: it takes the system's directory.
        tool = tool.env("TMPDIR", work.path(""));
    }
    if let Some(proxy) = proxy(work)? {
        tool = tool.env("http_proxy", &proxy);
    }
    tool = tool.env("SOURCE_DATE_EPOCH", EPOCH.to_string());
    if has_private_mounts(work) {
        tool = private_mounts().then(tool);
    }
    work.run(&tool.follow(Phase::Root)).map(drop).map_err(|error| match error.kind() {
        ErrorKind::Io => error.hint(
            "check that apt-get update works here; an ordinary user needs uidmap and a range in /etc/subuid, or the package fakechroot",
        ),
        _ => error,
    })
}

fn unsupported(why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the image debian cannot be made here: {why}"))
        .hint("it needs Debian or Ubuntu; give any root file system with: vmkit image build NAME --rootfs DIR|TAR")
}

/// Root's mmdebstrap mounts `/proc` and more in the tree it makes, for all of this machine to see. Killed hard enough it leaves
/// them, and then the tree cannot be removed. In a mount namespace of its own they go when its last process does.
fn private_mounts() -> Tool {
    Tool::new("unshare", "util-linux").args(&["--mount", "--"])
}

/// Whether that can be done: a container's root may not, and then mmdebstrap mounts nothing either.
fn has_private_mounts(work: &Work<'_>) -> bool {
    rustix::process::geteuid().is_root() && work.run(&private_mounts().arg("true")).is_ok()
}

/// The proxy that apt was told to use, which mmdebstrap does not look for.
fn proxy(work: &Work<'_>) -> Result<Option<String>> {
    let tool = Tool::new("apt-config", "apt").args(&["--format", "%v%n", "dump", "Acquire::http::Proxy"]);
    let text = String::from_utf8_lossy(&work.run(&tool)?).trim().to_owned();
    Ok(Some(text).filter(|text| text.starts_with("http")))
}

fn codename(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(value.trim_matches('"').to_owned()).filter(|name| !name.is_empty())
}

/// The parts of apt's configuration that serve one release, its updates and its security fixes; not its backports, and nothing
/// of third parties.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sources {
    deb822: String,
    lines: String,
}

impl Sources {
    fn read(etc: &Path, codename: &str) -> Sources {
        let mut files: Vec<PathBuf> = vec![etc.join("sources.list")];
        let parts = fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten();
        files.extend(parts.map(|entry| entry.path()));
        files.sort();
        let mut sources = Sources::default();
        for file in files {
            let text = fs::read_to_string(&file).unwrap_or_default();
            match file.extension().and_then(|end| end.to_str()) {
                Some("sources") => sources.add_deb822(&text, codename),
                Some("list") => sources.add_lines(&text, codename),
                _ => {}
            }
        }
        sources
    }

    fn add_deb822(&mut self, text: &str, codename: &str) {
        for stanza in text.split("\n\n") {
            let lines: Vec<&str> = stanza.lines().filter(|line| !line.starts_with('#')).collect();
            let value = |name: &str| {
                lines.iter().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
                })
            };
            let off = value("Enabled").is_some_and(|value| ["no", "false", "0"].contains(&value.as_str()));
            let suites = value("Suites").unwrap_or_default();
            let suites: Vec<&str> = suites.split_whitespace().filter(|suite| serves(suite, codename)).collect();
            let binary = value("Types").is_some_and(|types| types.split_whitespace().any(|kind| kind == "deb"));
            if off || suites.is_empty() || !binary {
                continue;
            }
            for line in lines.iter().filter(|line| !line.trim().is_empty()) {
                let key = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
                match key.as_str() {
                    "suites" => self.deb822 += &format!("Suites: {}\n", suites.join(" ")),
                    "types" => self.deb822 += "Types: deb\n",
                    _ => self.deb822 += &format!("{line}\n"),
                }
            }
            self.deb822 += "\n";
        }
    }

    fn add_lines(&mut self, text: &str, codename: &str) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let mut words = line.split_whitespace().peekable();
            if words.next() != Some("deb") {
                continue;
            }
            if words.peek().is_some_and(|word| word.starts_with('[')) {
                words.find(|word| word.ends_with(']'));
            }
            if words.nth(1).is_some_and(|suite| serves(suite, codename)) {
                self.lines += &format!("{line}\n");
            }
        }
    }
}

fn serves(suite: &str, codename: &str) -> bool {
    let rest = suite.strip_prefix(codename);
    matches!(rest, Some("" | "-updates" | "-security" | "/updates"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_of_the_release_are_taken_and_others_are_not() {
        let mut sources = Sources::default();
        let text = "# comment\nTypes: deb deb-src\nURIs: mirror:one\nSuites: bookworm bookworm-updates bookworm-backports\n\
                    Components: main\nSigned-By:\n -----BEGIN\n .\n abc: def\n\nTypes: deb\nURIs: mirror:two\nSuites: nodistro\n\n\
                    Enabled: no\nTypes: deb\nURIs: mirror:three\nSuites: bookworm\n\nTypes: deb-src\nURIs: mirror:four\n\
                    Suites: bookworm\n";
        sources.add_deb822(text, "bookworm");
        assert_eq!(
            sources.deb822,
            "Types: deb\nURIs: mirror:one\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By:\n -----BEGIN\n .\n \
             abc: def\n\n"
        );
    }

    #[test]
    fn lines_of_the_release_are_taken_and_others_are_not() {
        let mut sources = Sources::default();
        let text = "deb mirror:one noble main # comment\n#deb mirror:two noble main\ndeb-src mirror:one noble main\n\
                    deb [ arch=amd64 signed-by=/key ] mirror:three noble-security main\ndeb mirror:four noble-backports main\n\
                    deb [trusted=yes] mirror:five noble/updates main\ndeb mirror:six other main\ndeb\n";
        sources.add_lines(text, "noble");
        assert_eq!(
            sources.lines,
            "deb mirror:one noble main\ndeb [ arch=amd64 signed-by=/key ] mirror:three noble-security main\n\
             deb [trusted=yes] mirror:five noble/updates main\n"
        );
    }

    #[test]
    fn the_code_name_is_read() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=trixie\n").as_deref(), Some("trixie"));
        assert_eq!(codename("VERSION_CODENAME=\"noble\"\n").as_deref(), Some("noble"));
        assert_eq!(codename("ID=other\nVERSION_CODENAME=\n"), None);
    }
}
