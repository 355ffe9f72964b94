//! Users and groups, from the guest's own files: a static binary has no name service.

use std::fs;

/// Whom a command runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Absent for a number that no file knows.
    pub name: Option<String>,
    pub home: String,
    pub shell: Option<String>,
}

/// Finds `name`, `uid`, `name:group` or `uid:gid`.
pub(super) fn find(wanted: &str) -> Result<User, String> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    resolve(wanted, &read("/etc/passwd"), &read("/etc/group"))
}

fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (who, with) = match wanted.split_once(':') {
        Some((who, with)) => (who, Some(with)),
        None => (wanted, None),
    };
    // Names come before numbers, as everywhere.
    let known = entry(passwd, |f| f.first() == Some(&who)).or_else(|| {
        let uid = number(who)?;
        entry(passwd, |f| f.get(2).and_then(|n| n.parse::<u32>().ok()) == Some(uid))
    });
    let mut user = match known {
        Some(fields) => from_passwd(&fields).ok_or_else(|| format!("the entry of user {who:?} is damaged"))?,
        None => {
            let uid = number(who).ok_or_else(|| format!("the guest has no user {who:?}"))?;
            User { uid, home: "/".to_owned(), ..User::default() }
        }
    };
    match with {
        // A group that is asked for is the only one, as in docker.
        Some(with) => {
            let known = entry(group, |f| f.first() == Some(&with)).and_then(|f| number(f.get(2)?));
            user.gid = known.or_else(|| number(with)).ok_or_else(|| format!("the guest has no group {with:?}"))?;
        }
        None => {
            if let Some(name) = &user.name {
                user.groups = memberships(group, name);
            }
        }
    }
    if !user.groups.contains(&user.gid) {
        user.groups.insert(0, user.gid);
    }
    Ok(user)
}

/// A user's or a group's number. The highest means "as it is" to the kernel, which would be root.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != u32::MAX)
}

fn entry(file: &str, is: impl Fn(&[&str]) -> bool) -> Option<Vec<&str>> {
    file.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| is(fields))
}

fn from_passwd(fields: &[&str]) -> Option<User> {
    let home = fields.get(5).filter(|home| !home.is_empty()).unwrap_or(&"/");
    Some(User {
        uid: number(fields.get(2)?)?,
        gid: number(fields.get(3)?)?,
        groups: Vec::new(),
        name: Some((*fields.first()?).to_owned()),
        home: (*home).to_owned(),
        shell: fields.get(6).filter(|shell| !shell.is_empty()).map(|shell| (*shell).to_owned()),
    })
}

fn memberships(group: &str, name: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            fields.get(3)?.split(',').any(|member| member == name).then(|| fields.get(2)?.parse().ok()).flatten()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/bash\nbad:x:no:1::/:\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,app\nusers:x:100:app\napp:x:1001:\n";

    #[test]
    fn names_numbers_and_groups() {
        let app = resolve("app", PASSWD, GROUP).unwrap();
        assert_eq!((app.uid, app.gid, app.home.as_str()), (1000, 1001, "/home/app"));
        assert_eq!(app.groups, [1001, 10, 100]);
        assert_eq!(resolve("1000", PASSWD, GROUP).unwrap(), app);
        let other = resolve("app:users", PASSWD, GROUP).unwrap();
        assert_eq!((other.gid, other.groups), (100, vec![100]));
        let unknown = resolve("4242:4243", PASSWD, GROUP).unwrap();
        assert_eq!((unknown.uid, unknown.gid, unknown.name, unknown.home.as_str()), (4242, 4243, None, "/"));
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert_eq!(resolve("nobody", PASSWD, GROUP).unwrap_err(), "the guest has no user \"nobody\"");
        assert_eq!(resolve("app:none", PASSWD, GROUP).unwrap_err(), "the guest has no group \"none\"");
        assert!(resolve("bad", PASSWD, GROUP).unwrap_err().contains("damaged"));
        assert!(resolve("", PASSWD, GROUP).is_err());
        // To the kernel it means "as it is", and the agent is root.
        for nobody in ["4294967295", "0:4294967295", "-1", "4294967296"] {
            assert!(resolve(nobody, PASSWD, GROUP).is_err(), "{nobody}");
        }
        let entry = "odd:x:4294967295:0::/:\n";
        assert!(resolve("odd", entry, GROUP).unwrap_err().contains("damaged"));
    }
}
